"""A client's own choice of the components that it trains, under a plan's `ComponentChoice`.

`hafl_app.training.probe` makes the probe; here is what surrounds it.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from hafl_app.lowrank.factors import Adapter
from hafl_app.lowrank.importance import product_change_scores
from hafl_app.lowrank.selection import select_within
from hafl_app.plan import TrainPlan


def probe_plan(plan: TrainPlan) -> TrainPlan:
    """Return the plan of the probe: all candidates are trained, for one pass or fewer steps."""
    if plan.choice is None:
        raise ValueError("the plan leaves the client no choice, so there is nothing to probe")
    steps = [steps for steps in (plan.choice.probe_steps, plan.max_steps) if steps]
    return replace(plan.without_choice(), local_epochs=1, max_steps=min(steps, default=0))


def contributions(received: Adapter, probed: Adapter, plan: TrainPlan) -> dict[str, Tensor]:
    """Return how far a probe has moved each trainable component's product, by module.

    Parameters
    ----------
    received
        The held components, as the server sent them.
    probed
        The trainable ones after the probe; an untrained factor may be left out.
    plan
        Of the probe.
    """
    scores = {}
    for name, after in probed.modules.items():
        before = received.modules[name].select(plan.modules[name].trainable_slots)
        scores[name] = product_change_scores(before, after.filled(before))
    return scores


def chosen_plan(plan: TrainPlan, scores: Mapping[str, Tensor], seed: int) -> TrainPlan:
    """Return the plan after the choice of the best components within the budgets.

    Parameters
    ----------
    scores
        Module name to a score for each trainable component; a module may have none.
    seed
        Of ties and of what is drawn at random.
    """
    if plan.choice is None:
        return plan
    known = {
        name: scores[name] if name in scores else Tensor(len(module.trainable)).zero_()
        for name, module in plan.modules.items()
    }
    budgets = {name: module.num_trained for name, module in plan.modules.items()}
    rule = plan.choice
    positions = select_within(budgets, known, rule.scope, rule.exploration, seed)
    return plan.chosen(
        {
            name: tuple(module.trainable[position] for position in positions[name])
            for name, module in plan.modules.items()
        }
    )


def reduced(adapter: Adapter, plan: TrainPlan) -> tuple[Adapter, TrainPlan]:
    """Return what is loaded for training: all that is held, or only what the client has chosen."""
    if plan.choice is None or not plan.choice.drops_rest:
        return adapter, plan
    modules, plans = {}, {}
    for name, module in plan.modules.items():
        modules[name] = adapter.modules[name].select(module.trainable_slots)
        plans[name] = replace(module, held=module.trainable)
    return Adapter(modules, adapter.head), replace(plan, modules=plans)
