"""Where a run stands: its stage, the clients that are done, and the time left of the whole run.

It stands in a file of the run's folder, from which the command that shows the run reads it, and is
said in a line from time to time where there is no terminal.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hafl_app.tracking.as_text import short_duration
from hafl_app.tracking.closing import STAGES

if TYPE_CHECKING:
    from hafl_app.run.workload import Step  # torch stays away from the command that reads this

PROGRESS_FILE: Final = "progress.json"
SAID_EVERY_S: Final = 30.0
_WRITTEN_EVERY_S = 0.5
_REMEMBERED = 5  # steps of a stage that its cost is the mean of
_LIKE = {
    "finish": ("finish", "score"),
    "evaluate": ("evaluate", "unseen"),
    "unseen": ("unseen", "evaluate"),
    "generate": ("generate", "evaluate"),
}

Say = Callable[[str], None]


class Progress:
    """Progress of one run; a `hafl_app.server.replies.Watch`.

    Parameters
    ----------
    folder
        Of the run, which may not be there yet.
    say
        Called with a line, at most one in `SAID_EVERY_S`; None says nothing.
    clock
        Seconds that only go on.
    """

    def __init__(
        self, folder: Path, say: Say | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._say, self._clock = folder / PROGRESS_FILE, say, clock
        self._steps: "Sequence[Step]" = ()
        self._texts: Mapping[int, float] = {}
        self._at = 0  # of the step that goes on
        self._stage, self._round = "", 0
        self._asked = self._done = 0
        self._done_texts = self._asked_texts = 0.0
        self._began = self._answered_at = self._said = clock()
        self._written = -_WRITTEN_EVERY_S
        self._costs: dict[str, list[tuple[float, float]]] = defaultdict(list)  # texts, seconds
        self._client_seconds = 0.0
        self.seconds: dict[str, float] = defaultdict(float)
        """Seconds so far by stage, those of this process."""

    def plan(self, steps: "Sequence[Step]", texts: Mapping[int, float]) -> None:
        """Set what there is to do, and what each client has to do in a round, by node id."""
        self._steps, self._texts, self._at = steps, texts, 0

    def begin(self, stage: str, server_round: int) -> None:
        """Begin a stage, also once more; the one before it ends."""
        self.end()
        self._stage, self._round = stage, server_round
        self._at = next(
            (
                number
                for number, step in enumerate(self._steps)
                if (step.stage, step.server_round) == (stage, server_round) and number >= self._at
            ),
            self._at,
        )
        self._show(at_once=True)

    def end(self) -> None:
        """End the stage that goes on, if one does."""
        if not self._stage:
            return
        took = self._clock() - self._began
        self.seconds[self._stage] += took
        step = self._current()
        if step is not None and step.texts:
            self._costs[self._stage].append((self._asked_texts or step.texts, took))
        self._reset()

    def _reset(self) -> None:
        self._stage, self._asked, self._done = "", 0, 0
        self._done_texts = self._asked_texts = 0.0
        self._began = self._answered_at = self._clock()

    def asked(self, node_ids: Sequence[int]) -> None:
        """Clients have been asked, in the stage that goes on."""
        self._asked += len(node_ids)
        if self._stage == "train":
            self._asked_texts += sum(self._texts.get(node_id, 0.0) for node_id in node_ids)
        self._show(at_once=True)

    def answered(self, node_id: int) -> None:
        """Record that a client has answered."""
        self._done += 1
        self._answered_at = self._clock()
        share = 1 / self._asked if self._asked else 0.0
        step = self._current()
        if self._asked_texts:
            self._done_texts += self._texts.get(node_id, 0.0)
        elif step is not None:
            self._done_texts += share * step.texts
        self._show()

    def trained(self, seconds: float) -> None:
        """Add the seconds that a client states for its training."""
        self._client_seconds += seconds

    def was_printed(self) -> None:
        """Wait with the next line: another one has just said how far the run is."""
        self._said = self._clock()

    def close(self) -> None:
        """End the last stage, and remove the file: the run is over."""
        self.end()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    # ---- the time left ---------------------------------------------------------------------

    def seconds_left(self) -> float | None:
        """Return the seconds that the whole run still takes; None before a client has trained."""
        if not self._steps or not (self._measured("train") or self._measured("alone")):
            return None
        later = self._steps[self._at + 1 :]
        return self._rest_of_step() + sum(self._seconds_of(step) for step in later)

    def _rest_of_step(self) -> float:
        step = self._current()
        if step is None:
            return 0.0
        texts = self._asked_texts or step.texts
        left = max(0.0, texts - self._done_texts)
        share = left / texts if texts else 0.0
        return max(0.0, share * self._seconds_of(step) - (self._clock() - self._answered_at))

    def _seconds_of(self, step: "Step") -> float:
        cost = self._cost(step.stage)
        if step.stage == "alone" and not self._costs["alone"]:
            # Fewer clients than in a round keep fewer of the trainers busy.
            at_once = self._at_once()
            single = (self._cost("train") or 0.0) * at_once
            return single * max(step.texts / at_once, step.longest)
        training = self._cost("train")
        known = sum(len(self._costs.get(name, ())) for name in _LIKE.get(step.stage, (step.stage,)))
        if cost and training and known == 1 and step.stage != "train":
            # What was measured once also loaded the model: no text costs more than in training.
            cost = min(cost, training * self._at_once())
        return (cost or 0.0) * step.texts

    def _cost(self, stage: str | None) -> float | None:
        """Return the seconds of a text in a stage or one like it, else in all of them so far."""
        for like in _LIKE.get(stage or "", (stage,)):
            known = self._measured(like or "")
            if known:
                return _seconds_of_a_text(known)
        return _seconds_of_a_text(
            [cost for name in {*self._costs, self._stage} for cost in self._measured(name)]
        )

    def _measured(self, stage: str) -> list[tuple[float, float]]:
        """Return texts and seconds of a stage's last steps; the one that goes on if it is new."""
        known = self._costs.get(stage, [])
        if not known and stage == self._stage and self._done_texts:
            return [(self._done_texts, self._answered_at - self._began)]
        # The first one also loaded the model.
        return known[1:][-_REMEMBERED:] or known

    def _at_once(self) -> float:
        """Return how many clients trained at once, by their own seconds."""
        seconds = self.seconds["train"]
        return max(1.0, self._client_seconds / seconds) if seconds else 1.0

    def _current(self) -> "Step | None":
        step = self._steps[self._at] if self._at < len(self._steps) else None
        return step if step is not None and step.stage == self._stage else None

    # ---- where it is shown -----------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return where the run stands, as plain values."""
        return {
            "stage": self._stage,
            "round": self._round,
            "rounds": max((s.server_round for s in self._steps if s.stage == "score"), default=0),
            "done": self._done,
            "asked": self._asked,
            "seconds_left": self.seconds_left(),
            "written": time.time(),
        }

    def _show(self, *, at_once: bool = False) -> None:
        now = self._clock()
        if self._say is not None and now - self._said >= SAID_EVERY_S:
            self._said = now
            self._say(progress_line(self.state()))
        if at_once or now - self._written >= _WRITTEN_EVERY_S:
            self._written = now
            self._write()

    def _write(self) -> None:
        # Nothing depends on this file: a full disk is reported by those that matter.
        temporary = self._path.with_name(f"{PROGRESS_FILE}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(self.state()), encoding="utf-8")
            temporary.replace(self._path)


def _seconds_of_a_text(known: Sequence[tuple[float, float]]) -> float | None:
    texts = sum(done for done, _ in known)
    return sum(seconds for _, seconds in known) / texts if texts else None


def progress_line(state: Mapping[str, Any]) -> str:
    """Return a line of at most 80 columns: round, stage, clients that are done, time left.

    Parameters
    ----------
    state
        From `Progress.state`, or from its file.
    """
    number, rounds, stage = state["round"], state["rounds"], state["stage"]
    parts = [f"round {number}/{rounds}"] if number <= rounds else []
    parts.append(STAGES.get(stage, stage or "preparing"))
    if state["asked"]:
        parts.append(f"{state['done']} of {state['asked']} clients")
    if state["seconds_left"] is not None:
        parts.append(f"ETA {short_duration(state['seconds_left'])}")
    return ", ".join(parts)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """Read where the run in a folder stands; None if it says nothing."""
    try:
        found = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {"stage", "round", "rounds", "done", "asked", "seconds_left", "written"}
    return found if isinstance(found, dict) and wanted <= found.keys() else None
