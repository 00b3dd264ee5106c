"""Capacity of a radio uplink: path loss by distance and Shannon's rate.

Simulated clients have no bandwidth, so a run that allocates bits by it needs a model of one. HAFLQ
(Su, Yan and Deng, arXiv:2411.06581v2, section II-C, equations 11 and 12) has a Shannon rate and ten
clients 1100, 1200, ..., 2000 m from a base station; this is known second hand. Its constants are
not: those here are 3GPP's macro cell (128.1 + 37.6 log10(d / km) dB, TR 36.814 table A.2.1.1.2-3),
a handset's 23 dBm and thermal noise at room temperature, -174 dBm/Hz, over 1 MHz.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite, log2, log10

PAPER_DISTANCES_M = tuple(range(1100, 2001, 100))
_RANGES: Mapping[str, tuple[float, float]] = {
    "bandwidth_hz": (1.0, 1e12),
    "transmit_power_dbm": (-100.0, 100.0),
    "noise_dbm_per_hz": (-300.0, 0.0),
    "path_loss_db_at_1km": (0.0, 300.0),
    "path_loss_exponent": (1.0, 10.0),
}
_LEAST_DISTANCE_M, _MOST_DISTANCE_M = 1.0, 1e9


@dataclass(frozen=True)
class Channel:
    """An uplink, the same for all but for the distance; without fading and interference.

    Parameters
    ----------
    bandwidth_hz
        ``W``, of each client by itself, from 1 to 1e12.
    transmit_power_dbm
        ``P``, from -100 to 100; 30 dBm is 1 W.
    noise_dbm_per_hz
        ``N0``, from -300 to 0.
    path_loss_db_at_1km
        From 0 to 300.
    path_loss_exponent
        From 1 to 10; 2 is free space.
    distances_m
        Of the clients in partition order, from 1 to 1e9 m, used again from the start for more.

    Raises
    ------
    ValueError
        Naming the value that is out of its range.
    """

    bandwidth_hz: float = 1e6
    transmit_power_dbm: float = 23.0
    noise_dbm_per_hz: float = -174.0
    path_loss_db_at_1km: float = 128.1
    path_loss_exponent: float = 3.76
    distances_m: tuple[float, ...] = PAPER_DISTANCES_M

    def __post_init__(self) -> None:
        for setting in fields(self):
            if setting.name in _RANGES:
                _check(setting.name, getattr(self, setting.name), *_RANGES[setting.name])
        if not self.distances_m:
            raise ValueError("distances_m is empty, expected at least one in meters")
        for distance in self.distances_m:
            _check("distances_m", distance, _LEAST_DISTANCE_M, _MOST_DISTANCE_M)

    def distance_m(self, partition_id: int) -> float:
        """Return a client's distance."""
        return self.distances_m[partition_id % len(self.distances_m)]

    def path_loss_db(self, distance_m: float) -> float:
        """Return ``L(1 km) + 10 n log10(d / 1 km)``, -10 log10 of the power gain ``h``."""
        return self.path_loss_db_at_1km + 10 * self.path_loss_exponent * log10(distance_m / 1e3)

    def rate_bps(self, distance_m: float) -> float:
        """Return ``C = W log2(1 + P h / (N0 W))`` in bit/s.

        Shannon, "A Mathematical Theory of Communication", 1948: what no code exceeds.
        """
        noise_dbm = self.noise_dbm_per_hz + 10 * log10(self.bandwidth_hz)
        received_dbm = self.transmit_power_dbm - self.path_loss_db(distance_m)
        return self.bandwidth_hz * log2(1 + 10 ** ((received_dbm - noise_dbm) / 10))


def _check(name: str, value: float, least: float, most: float) -> None:
    if not (isfinite(value) and least <= value <= most):
        raise ValueError(f"{name}={value}: expected {least:g} to {most:g}")
