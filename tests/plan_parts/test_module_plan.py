import math

import pytest
from hypothesis import given
from plan_strategies import module_plans

from hafl_app.plan_parts.module_plan import ModulePlan


class TestModulePlan:
    def test_slots_are_positions_among_the_held(self):
        plan = ModulePlan(held=(9, 2, 5, 7), trainable=(5, 9))

        assert plan.trainable_slots == (2, 0)
        assert plan.frozen_slots == (1, 3)

    @given(module_plans())
    def test_every_slot_is_either_trainable_or_frozen(self, plan):
        slots = plan.trainable_slots + plan.frozen_slots

        assert sorted(slots) == list(range(len(plan.held)))
        assert tuple(plan.held[slot] for slot in plan.trainable_slots) == plan.trainable

    @pytest.mark.parametrize(
        ("held", "trainable", "message"),
        [
            ((1, 1), (), "held components .* distinct"),
            ((-1,), (), "held components .* not negative"),
            ((0, 1), (2,), "among the held"),
            ((0, 1), (1, 1), "trainable components .* distinct"),
        ],
    )
    def test_impossible_components_are_refused(self, held, trainable, message):
        with pytest.raises(ValueError, match=message):
            ModulePlan(held, trainable)

    @pytest.mark.parametrize("scaling", [0.0, -2.0, math.nan])
    def test_impossible_scaling_is_refused(self, scaling):
        with pytest.raises(ValueError, match="scaling must be above 0"):
            ModulePlan((0,), (0,), scaling)

    @pytest.mark.parametrize("factors", ["a", "AB", "", None, ["A"]])
    def test_another_word_is_refused(self, factors):
        with pytest.raises(ValueError, match="factors must be one of A, B, both, got"):
            ModulePlan((0, 1), (1,), factors=factors)


class TestBits:
    @pytest.mark.parametrize(
        ("bits", "message"),
        [
            ((8,), "bits of 1 components, expected one for each of the 2 trainable"),
            ((8, 3), r"bits of 3 are not one of \(0, 2, 4, 8, 16\)"),
            ((2, 8), "bits must be never rising, got '2,8'"),
        ],
    )
    def test_impossible_bits_are_refused(self, bits, message):
        with pytest.raises(ValueError, match=message):
            ModulePlan((0, 1), (1, 0), bits=bits)

    def test_those_with_none_are_not_uploaded(self):
        module = ModulePlan((0, 1, 2), (2, 1, 0), bits=(8, 0, 0))
        assert module.num_uploaded == 1
        assert ModulePlan((0, 1, 2), (2, 1)).num_uploaded == 2
