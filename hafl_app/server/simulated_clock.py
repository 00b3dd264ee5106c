"""The simulated clock: seconds of clients on their devices, and of the rounds that wait for them.

A request takes its device ``overhead + 8 bytes_down / down + flops / (peak reached) + 8 bytes_up /
up`` seconds. The bytes are those of the ledger, the FLOPs those that the client counted for the
batches that it computed. An exchange takes as long as its slowest client, or until the deadline;
what the server computes takes no time.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from hafl_app.server.devices import DeviceClass, DevicesSettings
from hafl_app.server.round_messages import Reply
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import FLOPS

_BITS = 8e-6  # megabits of a byte


@dataclass(frozen=True)
class Fleet:
    """Devices of the clients.

    Parameters
    ----------
    classes
        Settings with the classes.
    name_of
        Class of a client, by name.
    """

    settings: DevicesSettings
    name_of: Callable[[NodeProfile], str]

    def device(self, profile: NodeProfile) -> DeviceClass:
        """Return a client's device."""
        return self.settings.classes[self.name_of(profile)]


class SimulatedClock:
    """Seconds of a run's clients and rounds.

    Parameters
    ----------
    fleet
        Devices of the clients.
    seed
        Of the jitter.
    silence_s
        Seconds that an exchange waits for a client that does not answer, where no deadline is set.
    """

    def __init__(self, fleet: Fleet, seed: int, silence_s: float) -> None:
        self.fleet = fleet
        self._seed, self._silence_s = seed, silence_s
        self._elapsed, self._waited, self._exchange = 0.0, 0.0, 0

    @property
    def _deadline_s(self) -> float:
        return self.fleet.settings.deadline_s or math.inf

    def begin(self) -> None:
        """Begin an exchange: requests to some clients, who all work at once."""
        self._elapsed, self._waited = self._elapsed + self._waited, 0.0
        self._exchange += 1

    def timed(self, replies: Iterable[Reply]) -> list[Reply]:
        """Return replies with their seconds, those behind the deadline rejected."""
        return [self._timed(reply) for reply in replies]

    def wait_for(self, replies: Iterable[Reply]) -> None:
        """Let the exchange last until these are there, or known not to come in time."""
        for reply in replies:
            seconds = reply.simulated_seconds
            seconds = self._silence_s if math.isnan(seconds) else seconds
            self._waited = max(self._waited, min(seconds, self._deadline_s))

    def take_round(self) -> float:
        """Return the seconds since the last round was taken: of all its exchanges."""
        seconds = self._elapsed + self._waited
        self._elapsed, self._waited, self._exchange = 0.0, 0.0, 0
        return seconds

    def _timed(self, reply: Reply) -> Reply:
        seconds = self._seconds(reply)
        reply = replace(reply, simulated_seconds=seconds)
        if seconds > self._deadline_s and not reply.error:
            return reply.rejected(
                f"missed devices.deadline_s={self._deadline_s:g} by "
                f"{seconds - self._deadline_s:.3g} s of the clock"
            )
        return reply

    def _seconds(self, reply: Reply) -> float:
        device = self.fleet.device(reply.profile)
        seconds = (
            device.overhead_s
            + reply.request.bytes_down * _BITS / device.down_mbps
            + reply.metrics.get(FLOPS, 0.0) / device.flops
            + reply.bytes_up * _BITS / device.up_mbps
        )
        return seconds * self._jitter(reply)

    def _jitter(self, reply: Reply) -> float:
        """Return a factor of mean 1, drawn for the client in this exchange of the round."""
        jitter = self.fleet.settings.jitter
        if not jitter:
            return 1.0
        place = f"{reply.server_round}/{self._exchange}/{reply.profile.partition_id}"
        drawn = random.Random(f"{self._seed}/devices/{place}")
        return drawn.lognormvariate(-(jitter**2) / 2, jitter)
