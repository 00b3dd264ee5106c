"""Privacy accounting: the epsilon at delta a run has spent, as dp_accounting computes it.

Apart from `privacy.py` because clients need no accountant, and its import takes a second.
"""

import bisect
import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

from dp_accounting import (  # type: ignore[import-untyped]
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.rdp import RdpAccountant  # type: ignore[import-untyped]

from hafl_app.privacy.mechanism import PrivacyOptions


@functools.lru_cache(maxsize=1024)
def central_epsilon(
    noise_multiplier: float, sampling_rate: float, rounds: int, delta: float
) -> float:
    """Return epsilon at delta after some rounds of `hafl_app.server.central_privacy.next_adapter`.

    Each round is the Poisson-sampled Gaussian mechanism; neighbors differ by one client's
    contribution in every round that drew it. Rényi accounting: Mironov, Talwar and Zhang, "Rényi
    Differential Privacy of the Sampled Gaussian Mechanism", arXiv:1908.10530, as dp_accounting
    computes it.

    Parameters
    ----------
    noise_multiplier
        Noise over sensitivity, above 0.
    sampling_rate
        Chance of each client to take part in a round, in (0, 1].
    rounds
        At least 0.
    delta
        In (0, 1).
    """
    event = PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier))
    return _epsilon(event, NeighboringRelation.ADD_OR_REMOVE_ONE, rounds, delta)


@functools.lru_cache(maxsize=1024)
def local_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Return epsilon at delta of one client after some uploads of `privatize_upload`.

    Neighbors differ in all of the client's data: its clipped change may turn round, by up to
    ``2 C``, so that the noise ``z C`` counts as a multiplier of ``z / 2``. Who was asked is known
    to the server, so sampling hides nothing.
    """
    event = GaussianDpEvent(noise_multiplier / 2)
    return _epsilon(event, NeighboringRelation.REPLACE_ONE, rounds, delta)


def epsilon_after(options: PrivacyOptions, rounds: int, sampling_rate: float) -> float:
    """Return the epsilon that a run has spent after these rounds; infinite without privacy.

    Under local privacy of a client that took part in all of them.
    """
    if options.kind == "central_dp":
        return central_epsilon(options.noise_multiplier, sampling_rate, rounds, options.delta)
    if options.kind == "local_dp":
        return local_epsilon(options.noise_multiplier, rounds, options.delta)
    return math.inf


def rounds_within(options: PrivacyOptions, sampling_rate: float, at_most: int) -> int:
    """Return the number of rounds within ``max_epsilon``, from 0 to ``at_most``."""
    if options.max_epsilon is None or options.kind == "none":
        return at_most
    return bisect.bisect_right(
        range(1, at_most + 1),
        options.max_epsilon,
        key=lambda rounds: epsilon_after(options, rounds, sampling_rate),
    )


def _epsilon(event: DpEvent, relation: NeighboringRelation, rounds: int, delta: float) -> float:
    if rounds == 0:
        return 0.0
    accountant = RdpAccountant(neighboring_relation=relation)
    with _without_convergence_warnings():
        accountant.compose(SelfComposedDpEvent(event, rounds))
    return float(accountant.get_epsilon(delta))


@contextmanager
def _without_convergence_warnings() -> Iterator[None]:
    """Keep quiet that some Rényi orders are left out: the minimum over the others still holds."""

    def other(record: logging.LogRecord) -> bool:
        return "failed to converge" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
