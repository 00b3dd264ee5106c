"""Simulated devices: classes of them, and which client has which.

Standard library only: settings are checked before anything heavy is imported.
"""

import math
from dataclasses import dataclass, field

from hafl_app.fields import REQUIRED, choice, number


@dataclass
class DeviceClass:
    """A class of simulated devices.

    Parameters
    ----------
    peak_flops
        FLOP/s that its data sheet states, in the precision that the class stands for.
    reached
        Share of ``peak_flops`` that training reaches, above 0 and at most 1.
    memory_mb
        MB (10^6 bytes) that training may take; a class whose clients' training steps take more is
        refused.
    down_mbps, up_mbps
        Bandwidth to the device and from it, in 10^6 bit/s.
    overhead_s
        Seconds of every request, beside what its FLOPs and bytes take: latency, polls, loading.
    up_to_rank
        ``assign: rank``: largest rank that the class affords; null: any.
    share
        ``assign: share``: weight of the class in the number of clients.
    """

    peak_flops: float = number(REQUIRED, above=0)
    reached: float = number(REQUIRED, above=0, at_most=1)
    memory_mb: float = number(REQUIRED, above=0)
    down_mbps: float = number(REQUIRED, above=0)
    up_mbps: float = number(REQUIRED, above=0)
    overhead_s: float = number(0.0, at_least=0)
    up_to_rank: int | None = number(None, at_least=1)
    share: float = number(1.0, above=0)

    @property
    def flops(self) -> float:
        """FLOP/s in training."""
        return self.peak_flops * self.reached


@dataclass
class DevicesSettings:
    """The simulated clock: what a client's FLOPs and bytes take on its device.

    Parameters
    ----------
    classes
        Classes of devices by name; none: no clock.
    assign
        Device of a client. ``rank``: of the classes that afford its rank, the one with the smallest
        ``up_to_rank``. ``share``: classes are dealt out by their shares, in the order in which they
        stand and as ``ranks.order`` says, whatever the ranks: the same for every method of a
        comparison.
    deadline_s
        Seconds of the clock that training, or evaluation, in a round waits for replies; a client
        that takes longer is left out of the round. Null: it waits for all.
    jitter
        Standard deviation of the logarithm of a factor on each client's time in each request,
        drawn by the seed with mean 1; 0: none.
    target
        Score of the task's primary metric that ``summary.json`` names the time to; null: none.
    """

    classes: dict[str, DeviceClass] = field(default_factory=dict)
    assign: str = choice("rank", "rank", "share")
    deadline_s: float | None = number(None, above=0)
    jitter: float = number(0.0, at_least=0)
    target: float | None = number(None, resumable=True)

    def class_of_rank(self, rank: int) -> str | None:
        """Return the name of the weakest class that affords a rank; None if there is none."""
        limits = {name: one.up_to_rank or math.inf for name, one in self.classes.items()}
        able = [name for name, limit in limits.items() if limit >= rank]
        return min(able, key=lambda name: limits[name], default=None)
