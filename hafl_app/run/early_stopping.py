"""Early stopping: the end of a run whose scores no longer get better."""

import math
from collections.abc import Iterable, Sequence

from hafl_app.metrics import Choice
from hafl_app.server.settings import EarlyStoppingSettings
from hafl_app.tracking.base import RoundRecord


def stop_reason(
    rounds: Sequence[RoundRecord], choice: Choice | None, settings: EarlyStoppingSettings
) -> str:
    """Return why a run ends after these rounds, in one line; empty if it goes on.

    It follows from the records alone, so that a resumed run decides as one that never stopped.

    Parameters
    ----------
    rounds
        All so far; round 0, before any training, does not count.
    choice
        By what the best round is chosen; None: by nothing, and then nothing stops a run.
    """
    if not settings.patience or choice is None:
        return ""
    merits = (
        choice.merit(record.metrics)[0]
        for record in rounds
        if record.server_round and choice.key in record.metrics
    )
    waited = _without_gain(merits, settings.min_delta)
    if waited < settings.patience:
        return ""
    more = f" by more than {settings.min_delta:g}" if settings.min_delta else ""
    times = "evaluation" if waited == 1 else "evaluations"
    return (
        f"{choice.phase} {choice.metric.title} has not become better{more} in {waited} {times} "
        f"(federation.early_stopping.patience={settings.patience})"
    )


def _without_gain(merits: Iterable[float], min_delta: float) -> int:
    """Count the last scores, more being better, that are no gain over the one before them.

    Small gains add up: each is measured against the last score that was a gain itself.
    """
    best, waited = -math.inf, 0
    for merit in merits:
        if merit > best + min_delta:
            best, waited = merit, 0
        else:
            waited += 1
    return waited
