import json
from dataclasses import replace

import pytest
from hypothesis import given
from plan_strategies import train_plans

from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.alignment import Alignment
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.own_weight import OwnWeight
from hafl_app.plan_parts.tail_pruning import TailPruning


class TestBits:
    def test_belong_to_mixed_uploads_and_to_no_others(self):
        with_bits, without = ModulePlan((0, 1), (1,), bits=(8,)), ModulePlan((0, 1), (1,))
        for module, upload, counts in ((with_bits, "int8", "1 .* 0"), (without, "mixed", "0 .* 1")):
            with pytest.raises(ValueError, match=f"module 'q': bits of {counts} with upload"):
                TrainPlan({"q": module}, upload=upload)
        assert TrainPlan({"q": with_bits}, upload="mixed").training_everything().upload == "fp32"

    def test_add_nothing_to_a_plan_without_them(self):
        text = TrainPlan({"q": ModulePlan((0, 1), (1,))}, upload="int8").to_json()
        assert json.loads(text)["modules"] == [["0-1", "1", 1.0, ["q"]]]
        mixed = TrainPlan({"q": ModulePlan((0, 1), (1,), bits=(8,))}, upload="mixed")
        assert json.loads(mixed.to_json())["modules"] == [["0-1", "1", 1.0, ["q"], "8"]]


class TestFactors:
    @pytest.mark.parametrize(("factors", "sides"), [("A", (0, 5)), ("B", (7, 0)), ("both", (7, 5))])
    def test_only_what_is_trained_is_uploaded(self, factors, sides):
        module = ModulePlan((0, 1, 2), (2, 0), factors=factors)
        assert module.uploaded_sides((7, 5)) == sides
        assert (module.trains_B, module.trains_A) == tuple(side > 0 for side in sides)
        for upload, number in (("fp32", 4), ("bf16", 2), ("int8", 1)):
            plan = TrainPlan({"q": module}, upload=upload)
            assert plan.upload_bytes({"q": (7, 5)}) == 2 * number * sum(sides)

    # Of 8 bits 5 and 7 bytes, of 2 bits 2 and 2; each with 2 bytes of scale.
    @pytest.mark.parametrize(("factors", "expected"), [("A", 11), ("B", 13), ("both", 24)])
    def test_a_component_has_a_scale_for_each_uploaded_factor(self, factors, expected):
        module = ModulePlan((0, 1, 2), (2, 0), bits=(8, 2), factors=factors)
        plan = TrainPlan({"q": module}, upload="mixed")
        assert plan.upload_bytes({"q": (7, 5)}) == expected

    def test_a_plan_of_both_is_written_as_before(self):
        text = TrainPlan({"q": ModulePlan((0, 1), (1,))}).to_json()
        assert json.loads(text)["modules"] == [["0-1", "1", 1.0, ["q"]]]

    def test_one_factor_stands_behind_the_bits(self):
        one = ModulePlan((0, 1), (1,), factors="B")
        text = TrainPlan({"q": one, "v": replace(one, factors="A"), "o": one}).to_json()
        assert [entry[3:] for entry in json.loads(text)["modules"]] == [
            [["q", "o"], "B"],
            [["v"], "A"],
        ]
        mixed = TrainPlan({"q": replace(one, bits=(4,))}, upload="mixed")
        assert json.loads(mixed.to_json())["modules"][0][3:] == [["q"], "4", "B"]

    def test_training_everything_is_of_the_same_factors(self):
        plan = TrainPlan({"q": ModulePlan((0, 1), (1,), factors="B")})
        assert plan.training_everything().modules["q"] == ModulePlan((0, 1), (0, 1), factors="B")


class TestTrainPlan:
    @given(train_plans())
    def test_survives_the_wire(self, plan):
        assert TrainPlan.from_json(plan.to_json()) == plan

    def test_equal_modules_share_one_entry(self):
        many = {f"layer.{i}": ModulePlan((0, 1, 2), (0, 2), 0.5) for i in range(30)}

        entries = json.loads(TrainPlan({**many, "odd": ModulePlan((0,), ())}).to_json())["modules"]

        assert [entry[:3] for entry in entries] == [["0-2", "0,2", 0.5], ["0", "", 1.0]]
        assert entries[0][3] == list(many)

    def test_an_own_weight_survives_and_is_left_out_where_there_is_none(self):
        plan = TrainPlan({"q": ModulePlan((0, 1), (0, 1))}, own_weight=OwnWeight("state", "client"))
        assert TrainPlan.from_json(plan.to_json()) == plan
        assert "own_weight" not in json.loads(replace(plan, own_weight=None).to_json())

    @pytest.mark.parametrize(
        ("module", "settings"),
        [
            (ModulePlan((0, 1), (0,)), {}),
            (ModulePlan((0, 1), (0, 1), factors="B"), {}),
            (ModulePlan((0, 1), (0, 1)), {"tail": TailPruning(0.5, 0.1, 1)}),
        ],
    )
    def test_an_own_weight_is_of_all_that_is_held(self, module, settings):
        with pytest.raises(ValueError, match="own_weight must be null with such a plan"):
            TrainPlan({"q": module}, own_weight=OwnWeight("state", "module"), **settings)

    def test_an_alignment_survives_and_is_left_out_where_there_is_none(self):
        plan = TrainPlan({"q": ModulePlan((0, 1), (0, 1))}, align=Alignment("B", 0.25))

        assert TrainPlan.from_json(plan.to_json()) == plan
        assert "align" not in json.loads(replace(plan, align=None).to_json())

    @pytest.mark.parametrize(
        ("module", "settings"),
        [
            (ModulePlan((0, 1), (0,)), {}),
            (ModulePlan((1, 0), (1, 0)), {}),
            (ModulePlan((1, 2), (1, 2)), {}),
            (ModulePlan((0, 1), (0, 1), own_lora_B=True), {}),
            (ModulePlan((0, 1), (0, 1)), {"importance": "smoothed"}),
            (ModulePlan((0, 1), (0, 1)), {"tail": TailPruning(0.5, 0.1, 1)}),
            (ModulePlan((0, 1), (0, 1), bits=(8, 8)), {"upload": "mixed"}),
            (ModulePlan((0, 1), (0, 1)), {"upload": "sparse", "density": 0.5}),
            (
                ModulePlan((0, 1), (0, 1), budget=1),
                {"choice": ComponentChoice("contribution", "module")},
            ),
        ],
    )
    def test_an_alignment_needs_components_that_nothing_tells_apart(self, module, settings):
        with pytest.raises(ValueError, match="align"):
            TrainPlan({"q": module}, align=Alignment("A"), **settings)
        TrainPlan({"q": module}, **settings)

    def test_training_everything_keeps_the_rest(self):
        plan = TrainPlan({"q": ModulePlan((4, 1), (1,), 0.5)}, head="frozen", max_steps=3)

        assert plan.training_everything() == TrainPlan(
            {"q": ModulePlan((4, 1), (4, 1), 0.5)}, head="frozen", max_steps=3
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"head": "avaraged"}, "head must be one of averaged, .*, sent, got 'avaraged'"),
            ({"importance": "norm"}, "importance must be one of none, .*, got 'norm'"),
            ({"epochs": 2}, "not a train plan: .*epochs"),
            ({"tail": {"decay": 0.5}}, "not a train plan: .*weight"),
            ({"align": {"factor": "A"}}, "not a train plan: .*weight"),
            ({"align": {"factor": "C", "weight": 1}}, "alignment factor must be one of A, B"),
            ({"align": {"factor": "A", "weight": 1.5}}, r"alignment weight must be in \[0, 1\]"),
            ({"align": True}, "not a train plan: Alignment is bool"),
            ({"own_weight": {"norm_of": "lora_A", "scope": "module"}}, "norm_of is 'lora_A', expe"),
            ({"own_weight": {"norm_of": "state"}}, "not a train plan: .*scope"),
            (
                {"upload": "int4"},
                "upload must be one of fp32, .*, sparse, got 'int4'",
            ),
            ({"error_feedback": True}, "error_feedback must be false with upload=fp32, got True"),
            ({"proximal": -0.1}, "proximal must be at least 0 and finite, got -0.1"),
            ({"proximal": float("inf")}, "proximal must be at least 0 and finite"),
            ({"proximal": "1"}, "proximal must be at least 0 and finite"),
            ({"proximal": None}, "proximal must be at least 0 and finite"),
            ({"logit_adjustment": -1}, "logit_adjustment must be null, or at least 0 and finite"),
            ({"logit_adjustment": "1"}, "logit_adjustment must be null, or at least 0 and finite"),
            ({"rates": []}, r"rates must be at least one, each in \(0, 1\], got '\(\)'"),
            ({"rates": [0.5, 0]}, "rates must be at least one"),
            ({"rates": [1.5]}, "rates must be at least one"),
            ({"rates": ["1"]}, "rates must be at least one"),
            ({"rates": 1}, "not a train plan"),
            ({"modules": [["0-1", "5", 1.0, ["q"]]]}, "among the held"),
            ({"modules": [["0-1", "0", "1", ["q"]]]}, "not a train plan"),
            ({"modules": [["0-1", "0", 1.0]]}, "not enough values"),
            ({"modules": [["0-1", "0", 1.0, ["q"], "8"]]}, "module 'q': bits of 1 components"),
            ({"modules": [["0-1", "0", 1.0, ["q"], ""]]}, "behind module names"),
            ({"modules": [["0-1", "0", 1.0, ["q"], 8]]}, "behind module names"),
            ({"modules": [["0-1", "0", 1.0, ["q"], "8", "8"]]}, "behind module names"),
            ({"modules": [["0-1", "0", 1.0, ["q"], "9"]]}, "bits: '9' is not like"),
            ({"modules": [["0-1", "0", 1.0, ["q"], "both"]]}, "bits: 'both' is not like"),
            ({"modules": [["0-1", "0", 1.0, ["q"], "C"]]}, "bits: 'C' is not like"),
            ({"modules": [["0-1", "0", 1.0, ["q"], "A", "B"]]}, "bits: 'A' is not like"),
            ({"modules": [["0-1", "0", 1.0, ["q"], "B", "8"]]}, "behind module names"),
            ({"modules": [["0-1", "0", 1.0, ["q"], ["A"]]]}, "behind module names"),
            ({"modules": [["0-1", "0", 1.0, ["q"], {}]]}, "expected some of budget, gain"),
            ({"modules": [["0-1", "0", 1.0, ["q"], {"bits": "8"}]]}, "expected some of budget"),
            ({"modules": [["0-1", "0", 1.0, ["q"], {"gain": 0}]]}, "gain must be above 0"),
            ({"modules": [["0-1", "0", 1.0, ["q"], {"gain": "2"}]]}, "gain must be above 0"),
            ({"modules": [["0-1", "0", 1.0, ["q"], {"own_lora_B": 1}]]}, "own_lora_B must be"),
            ({"modules": [["0-1", "0", 1.0, ["q"], "B", {"own_lora_B": True}]]}, "own_lora_B must"),
            ({"modules": [["0-1", "0", 1.0, ["q"], {"budget": 1}]]}, "a budget goes with a choice"),
            ({"choice": {"measure": "contribution"}}, "keys missing or unknown"),
            ({"choice": "contribution"}, "expected an object"),
            (
                {"upload": "sparse"},
                "density must be in .* with upload=sparse, else 1, got",
            ),
            ({"density": 0.5}, "density must be in"),
            ({"upload": "sparse", "density": 0}, "density must be in"),
            ({"upload": "sparse", "density": float("nan")}, "density must be in"),
            (
                {"upload": "sparse", "density": 0.5, "error_feedback": True},
                "error_feedback must be",
            ),
            ({"modules": [[[0, 1], "0", 1.0, ["q"]]]}, "not a train plan"),
        ],
    )
    def test_a_bad_plan_is_refused(self, change, message):
        good = json.loads(TrainPlan({"q": ModulePlan((0, 1), (0,))}).to_json())

        with pytest.raises(ValueError, match=message):
            TrainPlan.from_json(json.dumps(good | change))

    @pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"modules": []}'])
    def test_what_is_no_plan_is_refused(self, text):
        with pytest.raises(ValueError, match=r"."):
            TrainPlan.from_json(text)
