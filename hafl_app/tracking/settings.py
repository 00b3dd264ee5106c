"""Settings of the trackers."""

from dataclasses import dataclass

from hafl_app.fields import choice


@dataclass
class TrackingSettings:
    """Where metrics go beside `metrics.jsonl` and the terminal."""

    kind: str = choice("jsonl", "jsonl", "wandb", "none")
    project: str = "hafl"
    entity: str | None = None
    mode: str = choice("online", "online", "offline")
