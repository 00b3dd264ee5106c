"""FFA-LoRA: what its rounds leave alone, and what its mean is."""

import torch
from driving import MAX_RANK, Client, merge, noise, strategy_named, update_of

CLIENTS = [Client(rank, examples, i) for i, (rank, examples) in enumerate([(1, 10), (3, 25)])]


def test_plans_and_bytes_are_of_lora_b_alone():
    ffa, padding = strategy_named("ffa_lora"), strategy_named("zero_padding")
    profile, head = Client(3, 10, 0).profile, 4 * (3 * 7 + 3)

    assert {m.factors for m in ffa.plan(profile, 1).modules.values()} == {"B"}
    assert ffa.payload_bytes(profile)[0] == padding.payload_bytes(profile)[0]
    assert ffa.payload_bytes(profile)[1] == 4 * 3 * (7 + 6) + head
    assert padding.payload_bytes(profile)[1] == 4 * 3 * (7 + 5 + 6 + 9) + head


def test_lora_a_stays_to_the_bit_and_lora_b_is_the_mean_over_its_holders():
    strategy = strategy_named("ffa_lora")
    updates = [update_of(strategy, client, noise) for client in CLIENTS]

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        assert torch.equal(after[name].lora_A, before.lora_A)
        one, other = (update.adapter.modules[name].lora_B.double() for update in updates)
        got = after[name].lora_B.double()
        torch.testing.assert_close(got[:, 0], (10 * one[:, 0] + 25 * other[:, 0]) / 35)
        torch.testing.assert_close(got[:, 1:3], other[:, 1:], rtol=1e-6, atol=0)
        assert torch.equal(after[name].lora_B[:, 3], before.lora_B[:, 3])


def test_at_one_rank_the_mean_of_products_is_exact():
    strategy = strategy_named("ffa_lora")
    updates = [update_of(strategy, Client(MAX_RANK, n, i), noise) for i, n in enumerate((4, 9, 30))]

    after = merge(strategy, updates)

    for name, factors in after.items():
        products = [u.num_examples / 43 * u.adapter.modules[name].delta_weight() for u in updates]
        torch.testing.assert_close(factors.delta_weight(), sum(products), rtol=1e-4, atol=1e-5)
