"""The run in Weights & Biases, one wandb run per federation."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hafl_app.printable import printable, without_credentials
from hafl_app.tracking.base import FAILED, NO_HISTORY, ClientRow, History, TrackingError
from hafl_app.tracking.roundwise import RoundwiseTracker
from hafl_app.tracking.values import run_config

if TYPE_CHECKING:
    from wandb import Run


_LONGEST_NAME, _LONGEST_TAG = 128, 64  # that wandb takes


class WandbTracker(RoundwiseTracker):
    """Log to one wandb run, with server rounds as its steps.

    wandb is imported when the run starts, and only in the server process: clients never build a
    tracker.

    Parameters
    ----------
    project, entity
        Where the run belongs; ``entity=None`` is the account's own.
    mode
        ``"online"``, or ``"offline"`` to keep the run in `folder` for ``wandb sync``.
    folder
        Under which wandb writes its own ``wandb/`` folder.
    name
        Of the run.
    run_id
        wandb's id of the run; with one that it knows, the run is continued.
    tags
        Of the run.
    """

    def __init__(
        self,
        project: str,
        entity: str | None,
        mode: Literal["online", "offline"],
        folder: Path,
        name: str,
        run_id: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._project = project
        self._entity = entity
        self._mode = mode
        self._folder = folder
        self._name = name
        self._run_id = run_id
        self._tags = tags
        self._run: Run | None = None

    def start(
        self,
        settings: Mapping[str, Any],
        clients: Sequence[ClientRow],
        history: History = NO_HISTORY,
    ) -> None:
        """Open the run, with the settings and the clients as its config.

        Raises
        ------
        TrackingError
            When wandb has no account to log in to, or refuses the settings. It never asks.
        """
        import wandb  # noqa: PLC0415  slow, and not every run wants it

        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with _no_prompt():
                self._run = wandb.init(
                    project=self._project,
                    entity=self._entity,
                    mode=self._mode,
                    dir=str(self._folder),
                    name=printable(self._name, _LONGEST_NAME),
                    id=self._run_id,
                    tags=[printable(tag, _LONGEST_TAG) for tag in self._tags] or None,
                    resume="allow" if history.rounds else None,
                    config=run_config(settings, clients),
                    # Flower streams the output elsewhere; wandb must not wrap it a second time.
                    settings=wandb.Settings(console="off"),
                )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            reason = " ".join(str(error).split())
            is_login = isinstance(error, wandb.errors.AuthenticationError) or "key" in reason
            advice = ": set WANDB_API_KEY or use tracking.mode=offline" if is_login else ""
            raise TrackingError(f"wandb did not start ({reason}){advice}") from error

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close the run with exit code 0."""
        self._close({"status": "finished", **summary}, exit_code=0)

    def fail(self, reason: str, status: str = FAILED) -> None:
        """Write the reason and close the run, if one was opened, with exit code 1."""
        if self._run is not None:
            reason = without_credentials(reason)
            self._close({"status": status, "reason": reason}, exit_code=1)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        self._opened().log(dict(values), step=step)

    def _close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        run = self._opened()
        run.summary.update(dict(summary))
        run.finish(exit_code=exit_code)
        self._run = None

    def _opened(self) -> "Run":
        if self._run is None:
            raise RuntimeError(f"wandb run {self._name!r}: logged to before start or after the end")
        return self._run


@contextmanager
def _no_prompt() -> Iterator[None]:
    """Disable the keyboard, so that wandb raises where it would ask for a key."""
    keyboard = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = keyboard
