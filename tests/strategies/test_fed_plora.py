"""Fed-PLoRA: random components within the rank, the others frozen in the model."""

import numpy as np
from driving import MAX_RANK, Client, dense, merge, noise, strategy_named, update_of
from numpy.testing import assert_allclose

CLIENTS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (2, 25), (3, 7), (2, 31)])]


def drawn(strategy, client, server_round):
    plan = strategy.plan(client.profile, server_round)
    return {name: module.trainable for name, module in plan.modules.items()}


def test_a_client_holds_everything_and_trains_as_many_as_its_rank():
    strategy = strategy_named("fed_plora")
    for client in CLIENTS:
        for module in strategy.plan(client.profile, 1).modules.values():
            assert module.held == tuple(range(MAX_RANK))
            assert len(module.trainable) == client.rank


def test_the_draw_differs_by_round_client_and_module_and_is_even():
    strategy = strategy_named("fed_plora")
    rounds = range(1, 201)
    draws = [drawn(strategy, CLIENTS[1], r) for r in rounds]
    others = [drawn(strategy, CLIENTS[3], r) for r in rounds]

    assert draws != others
    assert any(d["query"] != d["dense"] for d in draws)
    counts = np.bincount([i for d in draws for i in d["query"]], minlength=MAX_RANK)
    assert_allclose(counts / len(draws), 2 / MAX_RANK, atol=0.12)


def test_a_component_is_the_mean_over_those_who_drew_it():
    strategy = strategy_named("fed_plora")
    updates = [update_of(strategy, client, noise) for client in CLIENTS]

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        for i in range(MAX_RANK):
            who = [u for u in updates if i in u.components(name)]
            b = before.lora_B[:, i].double().numpy()
            if who:
                weight = sum(u.num_examples for u in who)
                b = sum(
                    u.num_examples
                    / weight
                    * u.adapter.modules[name]
                    .lora_B[:, u.components(name).index(i)]
                    .double()
                    .numpy()
                    for u in who
                )
            assert_allclose(after[name].lora_B[:, i], b, atol=1e-6)


def test_is_hafl_with_freezing_and_random_selection():
    plora = strategy_named("fed_plora")
    hafl = strategy_named("hafl", "strategy.selection=random")
    one, other = (merge(s, [update_of(s, c, noise) for c in CLIENTS]) for s in (plora, hafl))
    for name, factors in one.items():
        assert np.array_equal(dense(factors), dense(other[name]))
