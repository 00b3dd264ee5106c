"""A factor that no client of a round trains is as it was before."""

from dataclasses import replace

import pytest
import torch
from driving import Client, merge, noise, strategy_named, update_of

from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.server.untrained_factors import UntrainedFactors

CLIENTS = (Client(2, 10, 0), Client(3, 25, 1))


def planned(factors):
    return TrainPlan({"query": ModulePlan((0, 1), (0, 1), factors=factors)})


class TestKept:
    @pytest.mark.parametrize(
        ("rounds", "trained"),
        [(["A"], "A"), (["B", "B"], "B"), (["A", "B"], "AB"), (["both", "B"], "AB"), ([], "")],
    )
    def test_is_what_no_plan_trains(self, rounds, trained):
        updates = [update_of(strategy_named("zero_padding"), c, noise) for c in CLIENTS]
        before, after = (u.adapter.modules["query"].select((0, 1)) for u in updates)
        untrained = UntrainedFactors()
        for factors in rounds:
            untrained.note(planned(factors))

        kept = untrained.kept({"query": after}, {"query": before})["query"]

        assert torch.equal(kept.lora_A, (after if "A" in trained else before).lora_A)
        assert torch.equal(kept.lora_B, (after if "B" in trained else before).lora_B)


def test_zero_padding_does_not_shrink_a_factor_that_is_not_trained():
    strategy = strategy_named("zero_padding")
    updates = []
    for client in CLIENTS:
        update = update_of(strategy, client, noise)
        only_B = {n: replace(m, factors="B") for n, m in update.plan.modules.items()}
        plan = replace(update.plan, modules=only_B)
        adapter = update.adapter.only(plan.uploaded_factors).filled(update.before)
        updates.append(replace(update, plan=plan, adapter=adapter))

    after = merge(strategy, updates)

    for name, before in strategy.global_adapter.modules.items():
        assert torch.equal(after[name].lora_A, before.lora_A)
        assert not after[name].lora_B[:, 3].any()  # no client's, as before
