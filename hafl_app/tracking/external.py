"""The external trackers that the settings switch on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from hafl_app.tracking.base import Tracker
from hafl_app.tracking.mlflow import MlflowTracker
from hafl_app.tracking.settings import TrackingSettings
from hafl_app.tracking.tensorboard import TensorboardTracker
from hafl_app.tracking.trackio import TrackioTracker
from hafl_app.tracking.wandb import WandbTracker


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it.

    Parameters
    ----------
    folder
        Of its results.
    run_id
        Its own id; one that goes on has that of its beginning.
    name, tags
        That it is shown under.
    """

    folder: Path
    run_id: str
    name: str
    tags: tuple[str, ...] = ()


_Make = Callable[[TrackingSettings, TrackedRun], Tracker]


def external_trackers(settings: TrackingSettings, run: TrackedRun) -> list[Tracker]:
    """Return the trackers that are switched on."""
    return [_MAKE[name](settings, run) for name in settings.chosen]


def _wandb(settings: TrackingSettings, run: TrackedRun) -> Tracker:
    mode: Literal["online", "offline"] = "offline" if settings.mode == "offline" else "online"
    return WandbTracker(
        settings.project, settings.entity, mode, run.folder, run.name, run.run_id, run.tags
    )


_MAKE: Final[Mapping[str, _Make]] = {
    "tensorboard": lambda _, run: TensorboardTracker(run.folder),
    "mlflow": lambda s, run: MlflowTracker(s.project, s.uri, run.name, run.run_id),
    "trackio": lambda s, run: TrackioTracker(s.project, run.name, run.run_id),
    "wandb": _wandb,
}
