"""The rule by which a client chooses: what it may be, and which choices it can have made."""

import pytest

from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.tail_pruning import TailPruning

RULE = ComponentChoice("contribution", "module")
PLAN = TrainPlan(
    {
        "query": ModulePlan((3, 1, 2), (3, 1), budget=1),
        "dense": ModulePlan((0, 5), (0, 5), budget=2),
    },
    choice=RULE,
)
OVER_MODEL = TrainPlan(PLAN.modules, choice=ComponentChoice("contribution", "model"))
SHAPES = {"query": (7, 5), "dense": (6, 9)}


class TestTheRule:
    @pytest.mark.parametrize(
        "values",
        [
            {"measure": "magnitude"},
            {"scope": "layer"},
            {"probe_steps": -1},
            {"probe_steps": True},
            {"smoothing": 1.0},
            {"exploration": float("nan")},
            {"drops_rest": 1},
        ],
    )
    def test_what_no_client_knows_is_refused(self, values):
        (name,) = values
        with pytest.raises(ValueError, match=f"choice: {name} is .* which no client knows"):
            ComponentChoice(**{"measure": "contribution", "scope": "model"} | values)

    def test_a_budget_goes_with_a_choice_and_only_with_one(self):
        with pytest.raises(ValueError, match="module 'query': a budget goes with a choice"):
            TrainPlan(PLAN.modules)
        with pytest.raises(ValueError, match="module 'q': a budget goes with a choice"):
            TrainPlan({"q": ModulePlan((0,), (0,))}, choice=RULE)

    @pytest.mark.parametrize("budget", [3, -1, 1.0, True])
    def test_a_budget_is_of_what_may_be_trained(self, budget):
        with pytest.raises(ValueError, match="budget must be from 0 to 2"):
            ModulePlan((3, 1, 2), (3, 1), budget=budget)

    @pytest.mark.parametrize(
        "more", [{"importance": "smoothed"}, {"tail": TailPruning(0.5, 0.1, 1)}]
    )
    def test_no_other_rule_stands_beside_it(self, more):
        with pytest.raises(ValueError, match="choice must be null with such a plan"):
            TrainPlan(PLAN.modules, choice=RULE, **more)

    def test_it_survives_the_wire_and_other_plans_do_not_grow(self):
        for plan in (PLAN, OVER_MODEL):
            assert TrainPlan.from_json(plan.to_json()) == plan
        assert "choice" not in TrainPlan({"q": ModulePlan((0,), (0,))}).to_json()


class TestTheChoice:
    def test_what_is_chosen_is_trained_and_the_rest_stays_held(self):
        after = PLAN.chosen({"query": (1,), "dense": (0, 5)})
        assert after.modules["query"] == ModulePlan((3, 1, 2), (1,), budget=1)
        assert after.modules["dense"] == PLAN.modules["dense"]
        assert after.upload_bytes(SHAPES) == PLAN.upload_bytes(SHAPES)

    @pytest.mark.parametrize(
        ("components", "message"),
        [
            ({"query": (2,), "dense": (0, 5)}, r"query: components 2 are not some of 3,1"),
            ({"query": (3, 1), "dense": (0,)}, r"query: 2 components chosen, expected 1"),
            ({"query": (), "dense": (0, 5)}, r"query: 0 components chosen, expected 1"),
            ({"query": (3,), "dense": (5, 0)}, r"dense: components 5,0 are not some of 0,5"),
            ({"query": (3,), "dense": (0, 0)}, r"dense: components 0,0 are not some of 0,5"),
            ({"query": (3,)}, "a choice without, or beyond, module 'dense'"),
            ({"query": (3,), "dense": (0, 5), "k": ()}, "a choice without, or beyond, module 'k'"),
        ],
    )
    def test_what_the_rule_cannot_have_chosen_is_refused(self, components, message):
        with pytest.raises(ValueError, match=message):
            PLAN.chosen(components)

    def test_over_the_model_the_sum_counts(self):
        after = OVER_MODEL.chosen({"query": (3, 1), "dense": (5,)})
        assert [len(m.trainable) for m in after.modules.values()] == [2, 1]
        with pytest.raises(ValueError, match="2 components chosen over the model, expected 3"):
            OVER_MODEL.chosen({"query": (3, 1), "dense": ()})

    def test_a_plan_without_a_choice_leaves_none(self):
        with pytest.raises(ValueError, match="the plan leaves no choice"):
            TrainPlan({"q": ModulePlan((0,), (0,))}).chosen({"q": (0,)})

    def test_over_the_model_bytes_are_a_bound_that_one_choice_reaches(self):
        # Three components: both of dense, 15 numbers each, and one of query, 12.
        bound = OVER_MODEL.upload_bytes(SHAPES)
        assert bound == 4 * (2 * 15 + 12)
        largest = OVER_MODEL.chosen({"query": (3,), "dense": (0, 5)})
        smaller = OVER_MODEL.chosen({"query": (3, 1), "dense": (5,)})
        assert largest.upload_bytes(SHAPES) == bound
        assert smaller.upload_bytes(SHAPES) == 4 * (2 * 12 + 15)
