"""The run in trackio's database on this machine, one trackio run per federation."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from hafl_app.tracking.base import FAILED, NO_HISTORY, ClientRow, History
from hafl_app.tracking.roundwise import RoundwiseTracker
from hafl_app.tracking.values import run_config, summary_values

if TYPE_CHECKING:
    from trackio import Run

_ID_LENGTH: Final = 8


class TrackioTracker(RoundwiseTracker):
    """Log to one trackio run, with server rounds as its steps.

    Parameters
    ----------
    project
        Where the run belongs.
    name
        Of the run.
    run_id
        The federation's own id; its start is appended to the name, by which trackio knows a run.
    """

    def __init__(self, project: str, name: str, run_id: str) -> None:
        super().__init__()
        self._project = project
        self._name = f"{name}-{run_id[:_ID_LENGTH]}"
        self._run: Run | None = None

    def start(
        self,
        settings: Mapping[str, Any],
        clients: Sequence[ClientRow],
        history: History = NO_HISTORY,
    ) -> None:
        """Open the run, with the settings and the clients as its config."""
        import trackio  # noqa: PLC0415  slow, and optional
        from trackio.sqlite_storage import SQLiteStorage  # noqa: PLC0415

        with _silent():
            self._run = trackio.init(
                project=self._project,
                name=self._name,
                config=run_config(settings, clients),
                resume="allow" if history.rounds else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            if history.rounds:
                last = SQLiteStorage.get_max_step_for_run(self._project, self._name)
                self._last_step = -1 if last is None else last
        self._replay(history)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the scores of the last and the best round, and end the run."""
        self._opened().log(summary_values(summary), step=max(self._last_step, 0))
        self._close()

    def fail(self, reason: str, status: str = FAILED) -> None:
        """End the run, if one was opened."""
        if self._run is not None:
            self._run.log({f"run/{status}": 1}, step=max(self._last_step, 0))
            self._close()

    def _write(self, values: Mapping[str, float], step: int) -> None:
        self._opened().log(dict(values), step=step)

    def _close(self) -> None:
        run, self._run = self._opened(), None
        with _silent():
            run.finish()

    def _opened(self) -> "Run":
        if self._run is None:
            raise RuntimeError(
                f"trackio run {self._name!r}: logged to before start or after the end"
            )
        return self._run


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what trackio prints out of the run's own lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
