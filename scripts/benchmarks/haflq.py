"""Bytes that clients at different distances upload in a round of HAFLQ, beside HAFL's.

The ten clients are those of the paper's table and distances, as far as they are known, see
docs/haflq.md. The messages are made, judged and counted as in `benchmarks.bytes`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from benchmarks.bytes import in_mid_run, measure_client
from hafl_app.config.compose import compose
from hafl_app.lowrank.factors import ModuleShape
from hafl_app.run import build
from hafl_app.strategies.haflq import Haflq
from hafl_app.wire.node_profile import NodeProfile

PAPER_SAVING = 0.49
"""Saving of communication in the paper's abstract, against a baseline that it does not name."""
_EXAMPLES, _CLIENTS, _MAX_RANK = 120, 10, 8


@dataclass(frozen=True)
class ClientBytes:
    """Upload of one client in a round, in bytes without the head.

    Parameters
    ----------
    distance_m, rate_bps
        Of the simulated uplink.
    budget
        Bytes of factors that it carries in a round.
    bits
        Number of bits to how many of the client's components have them.
    factors
        Bytes of codes and scales, at most ``budget``.
    mixed, fp32, int8
        HAFLQ's whole message, and HAFL's in these numbers.
    """

    rank: int
    distance_m: float
    rate_bps: float
    budget: int
    bits: Mapping[int, int]
    factors: int
    mixed: int
    fp32: int
    int8: int

    def row(self) -> dict[str, str]:
        """Return a line of the table."""
        return {
            "distance, m": f"{self.distance_m:g}",
            "rank": str(self.rank),
            "rate, Mbit/s": f"{self.rate_bps / 1e6:.2f}",
            "budget, bytes": f"{self.budget:,}",
            "components by bits": ", ".join(f"{n} at {b}" for b, n in self.bits.items()),
            "HAFLQ": f"{self.mixed:,}",
            "HAFL fp32": f"{self.fp32:,}",
            "HAFL int8": f"{self.int8:,}",
            "HAFLQ / fp32": f"{self.mixed / self.fp32 - 1:+.1%}",
        }


def measure_clients(
    upload_seconds: float, shapes: Mapping[str, ModuleShape]
) -> Iterator[ClientBytes]:
    """Measure a round's upload of each of the ten clients.

    Parameters
    ----------
    upload_seconds
        Seconds that a client may send, above 0.

    Raises
    ------
    benchmarks.timing.DisagreementError
        See `benchmarks.bytes.measure`.
    """
    settings = compose(["ranks=haflq", f"lora.max_rank={_MAX_RANK}"])
    overrides = ["strategy=haflq", f"strategy.upload_seconds={upload_seconds}"]
    haflq = cast(Haflq, in_mid_run(overrides, "mixed", shapes, _MAX_RANK))
    whole = in_mid_run(["strategy=hafl"], "fp32", shapes, _MAX_RANK)
    int8 = in_mid_run(["strategy=hafl"], "int8", shapes, _MAX_RANK)
    for partition_id, rank in enumerate(build.client_ranks(settings, _CLIENTS)):
        profile = NodeProfile(partition_id, _CLIENTS, rank, _EXAMPLES, "cpu")
        plan = haflq.plan(profile, 1)
        levels = [b for module in plan.modules.values() for b in module.bits]
        distance = haflq.channel.distance_m(partition_id)
        mixed = measure_client("haflq", haflq, profile).up
        yield ClientBytes(
            rank,
            distance,
            haflq.channel.rate_bps(distance),
            haflq.upload_budget(profile),
            {b: levels.count(b) for b in sorted(set(levels), reverse=True)},
            mixed.ideal,
            mixed.sent,
            measure_client("hafl", whole, profile).up.sent,
            measure_client("hafl", int8, profile).up.sent,
        )


def summary(clients: Sequence[ClientBytes]) -> str:
    """Return a round's bytes of all clients together, and what is saved, in one line."""
    mixed, fp32, int8 = (
        sum(getattr(client, name) for client in clients) for name in ("mixed", "fp32", "int8")
    )
    return (
        f"all {len(clients)}: HAFLQ {mixed:,} bytes, HAFL fp32 {fp32:,}, int8 {int8:,}; "
        f"HAFLQ {mixed / fp32 - 1:+.1%}, int8 {int8 / fp32 - 1:+.1%} against fp32 "
        f"(claimed by the paper against its own baseline: {-PAPER_SAVING:+.0%})"
    )
