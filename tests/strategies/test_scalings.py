"""What is averaged where clients' scalings differ, in written-out numbers.

One module of shape (2, 3), ``lora.lora_alpha=6`` and ``lora.scaling=per_rank``: a client of rank 2
trains under s = 3, one of rank 3 under s = 2. Weights are 1/4 and 3/4 by examples.
"""

import pytest
import torch
from driving import run_options, strategy_named

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.server.aggregation import merge
from hafl_app.server.update import ClientUpdate
from hafl_app.wire.node_profile import NodeProfile

# What the clients' optimizers end with, before the scaling is folded in.
RAW = {
    2: ([[1, 0, 2], [0, 4, 0]], [[1, 0], [2, 1]]),
    3: ([[1, 0, 2], [0, 0, 4], [4, 4, 4]], [[0, 1, 1], [1, 0, 2]]),
}
EXAMPLES = {2: 10, 3: 30}
# sum of w_k pad(A_k), and of w_k pad(s_k B_k): 1/4 * 3 * B_2 + 3/4 * 2 * B_3.
MEAN_A = [[1.0, 0.0, 2.0], [0.0, 1.0, 3.0], [3.0, 3.0, 3.0]]
MEAN_B = [[0.75, 1.5, 1.5], [3.0, 0.75, 3.0]]
# Of ||s_k B_k A_k||: B_2 A_2 = [1 0 2; 2 4 4], B_3 A_3 = [4 4 8; 9 8 10].
NORMS = {2: 3 * 41**0.5, 3: 2 * 341**0.5}


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def merged(name, *overrides):
    strategy = strategy_named(name, "lora.max_rank=3", *overrides)
    strategy.options = run_options(lora_alpha=6, scaling="per_rank")
    start = LoraFactors(torch.ones(3, 3), torch.ones(2, 3))
    strategy.global_adapter = Adapter({"dense": start})
    updates = []
    for partition, (rank, (lora_A, lora_B)) in enumerate(RAW.items()):
        plan = strategy.plan(NodeProfile(partition, 2, rank, EXAMPLES[rank], "cpu"), 1)
        assert plan.modules["dense"].scaling == 6 / rank
        trained = LoraFactors(tensor(lora_A), 6 / rank * tensor(lora_B))
        sent = strategy.dispatch(plan)
        updates.append(
            ClientUpdate(partition, EXAMPLES[rank], plan, sent, Adapter({"dense": trained}))
        )
    return strategy, merge(strategy, strategy.global_adapter, updates).modules["dense"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("zero_padding", ()), ("hetlora", ("strategy.weighting=examples",))],
)
def test_the_mean_is_of_the_factors_with_their_scaling(name, overrides):
    _, factors = merged(name, *overrides)

    torch.testing.assert_close(factors.lora_A, tensor(MEAN_A))
    torch.testing.assert_close(factors.lora_B, tensor(MEAN_B))


def test_raw_factors_would_be_another_method():
    raw_B = 1 / 4 * torch.nn.functional.pad(tensor(RAW[2][1]), (0, 1)) + 3 / 4 * tensor(RAW[3][1])
    _, factors = merged("zero_padding")

    # No one scaling makes the one mean the other.
    ratios = (factors.lora_B / raw_B)[raw_B != 0]
    assert ratios.min() == 2.0
    assert ratios.max() == 3.0


def test_norm_weights_are_of_what_a_client_adds_to_the_base():
    _, factors = merged("hetlora")
    share = NORMS[2] / (NORMS[2] + NORMS[3])

    expected_A = share * tensor([*RAW[2][0], [0, 0, 0]]) + (1 - share) * tensor(RAW[3][0])
    padded_B = torch.nn.functional.pad(tensor(RAW[2][1]), (0, 1))
    expected_B = share * 3 * padded_B + (1 - share) * 2 * tensor(RAW[3][1])
    torch.testing.assert_close(factors.lora_A, expected_A)
    torch.testing.assert_close(factors.lora_B, expected_B)


def test_each_client_starts_from_its_slice_of_the_global_function():
    strategy, factors = merged("zero_padding")
    strategy.global_adapter = Adapter({"dense": factors})

    for rank in RAW:
        plan = strategy.plan(NodeProfile(0, 2, rank, 9, "cpu"), 2)
        sent = strategy.dispatch(plan).modules["dense"]
        product = sent.lora_B @ sent.lora_A
        torch.testing.assert_close(product, tensor(MEAN_B)[:, :rank] @ tensor(MEAN_A)[:rank])


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "zero_padding"])
def test_with_one_rank_there_is_no_difference(name):
    strategy = strategy_named(name, "lora.max_rank=3")
    plans = {}
    for scaling in ("per_rank", "rslora", "constant"):
        strategy.options = run_options(lora_alpha=6, scaling=scaling)
        profiles = [NodeProfile(i, 2, 3, 9 + i, "cpu") for i in range(2)]
        plans[scaling] = {strategy.plan(p, 1).modules["dense"].scaling for p in profiles}
    assert all(len(scalings) == 1 for scalings in plans.values())
