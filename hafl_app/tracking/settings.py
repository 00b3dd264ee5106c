"""Settings of the trackers."""

from dataclasses import dataclass
from typing import Final

from hafl_app.fields import choice, setting

TRACKERS: Final = ("tensorboard", "mlflow", "trackio", "wandb")
"""Trackers beside the files and the terminal: each is a setting, a file of the group, a package."""

PACKAGES: Final = {"mlflow": "mlflow-skinny"}  # mlflow has it too, and a web page
"""Packages that are not called like their tracker."""


@dataclass
class TrackingSettings:
    """Trackers of a run's metrics beside `metrics.jsonl` and the terminal.

    `tracking=NAME` switches one on, `tracking=[NAME,NAME]` several.

    Parameters
    ----------
    tensorboard
        Write TensorBoard's event files into ``tensorboard/`` in the run's folder.
    mlflow
        Log to MLflow.
    trackio
        Log to trackio's database on this machine, in the folder that ``TRACKIO_DIR`` names.
    wandb
        Log to Weights & Biases.
    project
        Project at Weights & Biases and in trackio, experiment in MLflow.
    entity
        User or team at Weights & Biases; null: the account's default.
    mode
        ``online``, or ``offline``: Weights & Biases writes to the output folder alone.
    uri
        Store of MLflow: the address of a server, or ``sqlite:///FILE``. Null: what
        ``MLFLOW_TRACKING_URI`` says, else ``sqlite:///mlflow.db`` where the command was typed.
    """

    tensorboard: bool = setting(False, resumable=True)
    mlflow: bool = setting(False, resumable=True)
    trackio: bool = setting(False, resumable=True)
    wandb: bool = setting(False, resumable=True)
    project: str = setting("hafl", resumable=True)
    entity: str | None = setting(None, resumable=True)
    mode: str = choice("online", "online", "offline", resumable=True)
    uri: str | None = setting(None, resumable=True)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names in `TRACKERS` that are switched on."""
        return tuple(name for name in TRACKERS if getattr(self, name))

    def __str__(self) -> str:
        """Return the group's choice as it is typed."""
        if len(self.chosen) <= 1:
            return "".join(self.chosen) or "jsonl"
        return f"[{','.join(self.chosen)}]"
