"""HAFLQ: HAFL whose uploads have as many bits as a client's bandwidth carries, by importance.

Su, Yan and Deng, "Federated LLMs Fine-tuned with Adaptive Importance-Aware LoRA",
arXiv:2411.06581v2, sections II-C and V.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from hafl_app.fields import choice, number
from hafl_app.lowrank.bit_allocation import allocate_bits
from hafl_app.plan_parts.component_lists import BIT_LEVELS
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.number_formats import component_bytes
from hafl_app.server.method import Traits
from hafl_app.server.radio_channel import PAPER_DISTANCES_M, Channel
from hafl_app.strategies.hafl import Hafl
from hafl_app.wire.node_profile import NodeProfile

Place = tuple[str, int]
"""A module and one of its components."""


@dataclass(kw_only=True, eq=False)
class Haflq(Hafl):
    """HAFL with importance-aware, bandwidth-adaptive upload quantization.

    A client may upload ``D_k = C_k T`` bits of factors a round, ``C_k`` its rate and T
    ``upload_seconds``. All components that it trains start at 2 bits a number and rise to 4, 8 and
    16 while ``sum_i b_i (m_i + n_i)`` and the scales fit, the most important ones first; see
    `hafl_app.lowrank.bit_allocation`. Where not even 2 bits for all fit, the least important ones
    are trained but not uploaded, and so count in no average; what the client keeps back of them it
    adds to its next upload of the same component. Head, scores and a message's layout come on top.

    Only with ``federation.upload=mixed``, which this method's settings bring along; with other
    uploads it is HAFL.

    Differs from the paper: that bits follow importance and bandwidth is known from the abstract, a
    Shannon rate and the ten distances second hand; levels, order of the steps, codes, rounding and
    error feedback are reconstructions, and the channel's constants are 3GPP's. The other half of
    HAFLQ, a base model quantized block by block, is not part of this method.

    Parameters
    ----------
    upgrade
        ``level``: all components are raised by one level before any is raised by two.
        ``component``: the most important one is raised to 16 bits before the next one is raised.
    upload_seconds
        ``T``, above 0.
    bandwidth_hz, transmit_power_dbm, noise_dbm_per_hz, path_loss_db_at_1km, path_loss_exponent
        Of the simulated uplink, see `hafl_app.server.radio_channel`. A node that states its
        ``bandwidth-kbps`` has no need of it.
    distances_m
        Distance of the clients from the base station in meters, by partition.
    """

    traits = Traits(allocates_bits=True)

    upgrade: str = choice("level", "level", "component")
    upload_seconds: float = number(1.0, above=0)
    bandwidth_hz: float = 1e6
    transmit_power_dbm: float = 23.0
    noise_dbm_per_hz: float = -174.0
    path_loss_db_at_1km: float = 128.1
    path_loss_exponent: float = 3.76
    distances_m: list[float] = field(default_factory=lambda: list(PAPER_DISTANCES_M))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.channel = Channel(
            self.bandwidth_hz,
            self.transmit_power_dbm,
            self.noise_dbm_per_hz,
            self.path_loss_db_at_1km,
            self.path_loss_exponent,
            tuple(self.distances_m),
        )

    def upload_budget(self, profile: NodeProfile) -> int:
        """Compute a client's upload budget of a round in bytes of factors, ``D_k / 8``.

        At the rate that its operator states, else at that of the channel model.
        """
        stated = profile.bandwidth_kbps * 1000
        rate = stated or self.channel.rate_bps(self.channel.distance_m(profile.partition_id))
        return int(rate * self.upload_seconds / 8)

    def module_plans(self, profile: NodeProfile, server_round: int) -> Mapping[str, ModulePlan]:
        """Return HAFL's choice, every trained component with its bits."""
        chosen = super().module_plans(profile, server_round)
        if self.options.federation.upload != "mixed":
            return chosen
        bits = self._bits(chosen, self.upload_budget(profile))
        return {name: _with_bits(module, bits, name) for name, module in chosen.items()}

    def _bits(self, chosen: Mapping[str, ModulePlan], budget: int) -> dict[Place, int]:
        """Allocate bits to all components that a client trains, over all modules together."""
        places = sorted(
            ((name, i) for name, module in chosen.items() for i in module.trainable),
            key=lambda place: place[1],  # decides among equals: every module's first one first
        )
        if not places:
            return {}
        scores, shapes = self.selection_scores(), self.layer_shapes()
        importance = torch.stack([scores[name][i].double().cpu() for name, i in places])
        costs = {
            name: [component_bytes(b, *module.uploaded_sides(shapes[name])) for b in BIT_LEVELS[1:]]
            for name, module in chosen.items()
        }
        levels = allocate_bits(
            importance,
            torch.tensor([costs[name] for name, _ in places]),
            budget,
            self.upgrade,  # type: ignore[arg-type]
        )
        return {
            place: BIT_LEVELS[level] for place, level in zip(places, levels.tolist(), strict=True)
        }


def _with_bits(module: ModulePlan, bits: Mapping[Place, int], name: str) -> ModulePlan:
    """Return the plan with bits, components of many bits first as a plan must list them."""
    order = sorted(module.trainable, key=lambda i: -bits[name, i])
    return replace(module, trainable=tuple(order), bits=tuple(bits[name, i] for i in order))
