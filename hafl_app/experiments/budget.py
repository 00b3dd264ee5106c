"""Equal mean bytes: the one rank that costs no more than a method for mixed ranks."""

from collections.abc import Mapping, Sequence

from hafl_app.config.schema import Settings
from hafl_app.lowrank.factors import ModuleShape, initial_adapter
from hafl_app.run import build
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.wire.node_profile import NodeProfile

BYTES_PER_NUMBER = 4


def equal_mean_bytes_rank(settings: Settings) -> int:
    """Return the rank at which homogeneous clients cost on average what these settings cost.

    Bytes per client and round, down and up, head included; the rank is rounded down, so that the
    homogeneous federation never has the larger budget.
    """
    text = build.federated_text(settings, settings.federation.num_clients)
    spec = build.model_spec(settings, len(text.label_names))
    shapes = adapter_shapes(spec)
    head = 0
    if settings.model.head == "averaged":
        head = sum(tensor.numel() for tensor in spec.initial_head().values())
    strategy = build.strategy(settings)
    strategy.global_adapter = initial_adapter(shapes, strategy.max_rank, settings.seed)
    ranks = build.client_ranks(settings, settings.federation.num_clients)
    return homogeneous_rank(mean_bytes(strategy, ranks, head), shapes, head)


def mean_bytes(strategy: HeterogeneousLora, ranks: Sequence[int], head_parameters: int) -> float:
    """Return the mean bytes of a client's first round, down and up, as the method plans it.

    ``4 (sum_m (held_m + trained_m) (out_m + in_m) + 2 head)``, averaged over the clients; up only
    the factors that are trained. Message headers, importance scores, what a client prunes later and
    what a method later merges into the base are left out.

    Parameters
    ----------
    strategy
        With its options and an initial global adapter.
    ranks
        Rank budget of every client.
    head_parameters
        Numbers in the head, 0 if it does not travel.
    """
    numbers = 0.0
    for partition_id, rank in enumerate(ranks):
        plan = strategy.plan(NodeProfile(partition_id, len(ranks), rank, 1, "cpu"), 1)
        for name, factors in strategy.global_adapter.modules.items():
            module, shape = plan.modules[name], (factors.out_features, factors.in_features)
            held = plan.held_numbers({name: shape})
            trained = module.num_trained * sum(module.uploaded_sides(shape))
            numbers += plan.density * (held + trained)
    return BYTES_PER_NUMBER * (numbers / len(ranks) + 2 * head_parameters)


def homogeneous_rank(budget: float, shapes: Mapping[str, ModuleShape], head_parameters: int) -> int:
    """Return the largest rank, at least 1, whose bytes per client stay within a budget.

    A client of rank r costs ``4 (2 r sum_m (out_m + in_m) + 2 head)`` bytes a round.
    """
    per_rank = 2 * sum(shape.out_features + shape.in_features for shape in shapes.values())
    numbers = budget / BYTES_PER_NUMBER - 2 * head_parameters
    return max(1, int(numbers // per_rank))
