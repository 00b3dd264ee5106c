"""Interface of a tracker, its records, and the composite that passes them to several."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hafl_app.printable import printable, without_credentials

logger = logging.getLogger(__name__)


FAILED, INTERRUPTED = "failed", "interrupted"
"""How a run ended that did not finish: by an error, or by its user."""


class TrackingError(RuntimeError):
    """A tracker cannot work with the settings it was given; trying again will not help."""


@dataclass(frozen=True)
class ClientRow:
    """Client as known before the first round.

    Attributes
    ----------
    partition_id, node_id
        Which part of the data it holds; which Flower node it is.
    rank
        Rank of its adapter.
    examples
        Training examples it holds.
    device
        Where it trains, e.g. ``"cpu"`` or ``"cuda:0"``.
    bytes_down, bytes_up
        Planned bytes of a round to it and from it.
    """

    partition_id: int
    node_id: int
    rank: int
    examples: int
    device: str
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class ClientRecord:
    """Record of one client's training in one round.

    Attributes
    ----------
    components_trained
        Rank-one components of the adapter that it trained, at most `rank`.
    num_examples
        Its weight in the average.
    stated_examples
        Examples that it states; more than its weight if that is bounded.
    loss
        Mean training loss; NaN when it did not train.
    seconds, peak_memory_mb
        Wall-clock time, and peak memory in MB of 10^6 bytes.
    bytes_down, bytes_up
        Sent to it and by it.
    error
        Reason of its failure; empty when it did not fail.
    probe_seconds
        Of `seconds`, those spent on measuring all components before training.
    steps, out_of_time
        Optimizer steps, and whether its time was over before its plan was done.
    flops, simulated_seconds
        Floating-point operations of its training, and the seconds of the whole request on its
        simulated device; NaN without a clock, or if they are not known.
    """

    server_round: int
    partition_id: int
    node_id: int
    rank: int
    components_trained: int
    num_examples: int
    loss: float
    seconds: float
    peak_memory_mb: float
    bytes_down: int
    bytes_up: int
    error: str = ""
    probe_seconds: float = 0.0
    steps: int = 0
    out_of_time: bool = False
    stated_examples: int = 0
    flops: float = math.nan
    simulated_seconds: float = math.nan


@dataclass(frozen=True)
class RoundRecord:
    """Record of one round of the federation.

    Attributes
    ----------
    server_round
        From 1; 0 is the evaluation before training.
    train_loss
        Mean over the clients that replied; NaN when none trained.
    bytes_down, bytes_up
        Over all clients, in this round alone.
    replies, failures
        Clients that answered, and clients that did not or answered with an error.
    metrics
        ``phase/name`` to value, e.g. ``"validation/accuracy"``, ``"test/macro-f1"``; accuracies
        and F1 in [0, 1].
    influence
        One entry a client whose reply counts: its ``partition_id`` and ``rank``; ``influence``, its
        share of the adapter's step, see `hafl_app.server.influence`; and its shares of ``examples``
        and of ``components`` times examples. Empty where it is not known.
    simulated_seconds
        Of this round alone, training and evaluation, on simulated devices; NaN without any.
    """

    server_round: int
    seconds: float
    train_loss: float
    bytes_down: int
    bytes_up: int
    replies: int
    failures: int
    metrics: Mapping[str, float]
    influence: Sequence[Mapping[str, float]] = field(default_factory=list)
    simulated_seconds: float = math.nan


@dataclass(frozen=True)
class History:
    """Records of the rounds before a resume, in the order in which they were logged."""

    rounds: Sequence[RoundRecord] = ()
    clients: Sequence[ClientRecord] = ()


NO_HISTORY = History()


class Tracker(Protocol):
    """Receiver of a run's records: `start`, then rounds and clients, then `finish` or `fail`."""

    def start(
        self,
        settings: Mapping[str, Any],
        clients: Sequence[ClientRow],
        history: History = NO_HISTORY,
    ) -> None:
        """Begin a run with these settings and these clients, or resume one."""

    def log_round(self, record: RoundRecord) -> None:
        """Record one round."""

    def log_client(self, record: ClientRecord) -> None:
        """Record one client's part of a round."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End a run that went well."""

    def fail(self, reason: str, status: str = FAILED) -> None:
        """End a run that did not, `FAILED` or `INTERRUPTED`; may be called before `start`."""


class Trackers:
    """Composite that passes every call on to several trackers.

    Every tracker is called before an error is raised, so a full disk does not leave a run open
    elsewhere.

    Parameters
    ----------
    required
        Trackers whose errors end the run: losing their record means losing the run.
    external
        Trackers that depend on something outside, such as a network. The first error of one is
        logged, and it is disabled. Only a `TrackingError`, which means wrong settings, is raised
        from here too.
    """

    def __init__(self, required: Sequence[Tracker], external: Sequence[Tracker] = ()) -> None:
        self._required = list(required)
        self._external = list(external)

    def start(
        self,
        settings: Mapping[str, Any],
        clients: Sequence[ClientRow],
        history: History = NO_HISTORY,
    ) -> None:
        """Begin a run, or resume one.

        External trackers first: what they refuse leaves the files of an earlier run as they are.
        """

        def start(tracker: Tracker) -> None:
            tracker.start(settings, clients, history)

        self._call_each(start, self._external)
        self._call_each(start, self._required)

    def log_round(self, record: RoundRecord) -> None:
        """Record one round."""
        self._call_each(lambda tracker: tracker.log_round(record))

    def log_client(self, record: ClientRecord, *, external: bool = True) -> None:
        """Record one client's part of a round; `external` trackers may be left out."""
        also = self._external if external else ()
        self._call_each(lambda tracker: tracker.log_client(record), [*self._required, *also])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End a run that went well."""
        self._call_each(lambda tracker: tracker.finish(summary))

    def fail(self, reason: str, status: str = FAILED) -> None:
        """End a run that did not."""
        self._call_each(lambda tracker: tracker.fail(reason, status))

    def _call_each(
        self, call: Callable[[Tracker], None], trackers: Sequence[Tracker] | None = None
    ) -> None:
        errors: list[Exception] = []
        for tracker in list([*self._required, *self._external] if trackers is None else trackers):
            try:
                call(tracker)
            except Exception as error:
                if tracker in self._required or isinstance(error, TrackingError):
                    errors.append(error)
                else:
                    self._drop(tracker, error)
        if errors:
            raise errors[0]

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        self._external.remove(tracker)
        logger.warning(
            "%s failed and is disabled for the rest of this run: %s: %s",
            type(tracker).__name__,
            type(error).__name__,
            printable(without_credentials(error)),
        )
