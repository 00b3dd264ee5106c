"""The run as TensorBoard's event files, in ``tensorboard/`` of the run's folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hafl_app.printable import printable, without_credentials
from hafl_app.tracking.base import FAILED, NO_HISTORY, ClientRow, History
from hafl_app.tracking.roundwise import RoundwiseTracker
from hafl_app.tracking.values import run_config, summary_values

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LONGEST_REASON = 2000


class TensorboardTracker(RoundwiseTracker):
    """Write scalars with server rounds as their steps; settings, and how the run ended, as text.

    Parameters
    ----------
    folder
        Of the run. A new run replaces the event files of an earlier one in it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None

    def start(
        self,
        settings: Mapping[str, Any],
        clients: Sequence[ClientRow],
        history: History = NO_HISTORY,
    ) -> None:
        """Open a file of events; of a run that goes on, steps after its history count no more."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  takes a second

        earlier = sorted(self._folder.glob("events.out.tfevents.*"))
        last = history.rounds[-1].server_round if history.rounds else None
        if last is None:
            for file in earlier:
                file.unlink()
        self._writer = SummaryWriter(
            str(self._folder), purge_step=None if last is None else last + 1
        )
        if last is not None and earlier:
            self._last_step = last
            return
        config = json.dumps(run_config(settings, clients), indent=2, default=str)
        self._writer.add_text("settings", "\n".join(f"    {s}" for s in config.splitlines()), 0)
        self._replay(history)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the scores of the last and the best round, and close the file."""
        for name, value in summary_values(summary).items():
            self._opened().add_scalar(name, value, self._last_step)
        self._close("finished")

    def fail(self, reason: str, status: str = FAILED) -> None:
        """Write the reason and close the file, if one was opened."""
        if self._writer is not None:
            self._close(f"{status}: {printable(without_credentials(reason), _LONGEST_REASON)}")

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._opened().add_scalar(name, value, step)
        self._opened().flush()

    def _close(self, status: str) -> None:
        writer, self._writer = self._opened(), None
        writer.add_text("status", status, max(self._last_step, 0))
        writer.close()

    def _opened(self) -> "SummaryWriter":
        if self._writer is None:
            raise RuntimeError(f"{self._folder}: logged to before start or after the end")
        return self._writer
