"""Settings of the trackers."""

from dataclasses import dataclass

from hafl_app.fields import choice, setting


@dataclass
class TrackingSettings:
    """Trackers of a run's metrics beside `metrics.jsonl` and the terminal.

    Parameters
    ----------
    kind
        ``wandb``: Weights & Biases too; ``jsonl`` and ``none``: nothing more.
    project
        Project at Weights & Biases.
    entity
        User or team at Weights & Biases; null: the account's default.
    mode
        ``online``, or ``offline``: Weights & Biases writes to the output folder alone.
    """

    kind: str = choice("jsonl", "jsonl", "wandb", "none", resumable=True)
    project: str = setting("hafl", resumable=True)
    entity: str | None = setting(None, resumable=True)
    mode: str = choice("online", "online", "offline", resumable=True)
