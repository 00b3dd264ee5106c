"""Learning rate schedules over rounds: every round has one rate, which each plan carries."""

import math
from collections.abc import Callable, Mapping
from typing import Final

from hafl_app.training.settings import ScheduleSettings

_FALLS: Final[Mapping[str, Callable[[float], float]]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""From the share of the rounds after the warm-up that are done, in [0, 1), to a share in (0, 1]."""


def round_rates(schedule: ScheduleSettings, num_rounds: int) -> tuple[float, ...]:
    """Return the learning rate of every round over ``client.learning_rate``, in (0, 1].

    With ``W`` rounds of warm-up, round ``t`` has ``t / (W + 1)`` until then. Afterwards it has
    ``final + (1 - final) fall((t - W - 1) / (num_rounds - W))``: the first of these rounds is at
    the peak, and no round has the rate 0.

    Parameters
    ----------
    num_rounds
        Rounds of the whole run, more than those of the warm-up.
    """
    warmup, final = schedule.warmup_rounds, schedule.final
    after = num_rounds - warmup
    fall = _FALLS[schedule.kind]
    return (
        *(number / (warmup + 1) for number in range(1, warmup + 1)),
        *(final + (1 - final) * fall(done / after) for done in range(after)),
    )
