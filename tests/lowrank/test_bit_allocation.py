import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.lowrank.bit_allocation import allocate_bits

# Bytes at 1, 2 and 3 levels, of two kinds of component.
SMALL, LARGE = (3, 5, 9), (5, 8, 14)


def allocated(importance, costs, budget, upgrade="level"):
    return allocate_bits(
        torch.tensor(importance, dtype=torch.float64), torch.tensor(costs), budget, upgrade
    ).tolist()


def spent(levels, costs):
    return sum(row[level - 1] for level, row in zip(levels, costs, strict=True) if level)


@st.composite
def problems(draw):
    count = draw(st.integers(1, 7))
    importance = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    steps = st.lists(st.integers(1, 6), min_size=3, max_size=3)
    costs = [tuple(torch.tensor(draw(steps)).cumsum(0).tolist()) for _ in range(count)]
    return [float(i) for i in importance], costs, draw(st.integers(0, 60))


upgrades = st.sampled_from(["level", "component"])


class TestByHand:
    COSTS = (SMALL, LARGE, SMALL, LARGE)
    IMPORTANCE = (0.1, 0.9, 0.5, 0.3)  # so the order is 1, 2, 3, 0

    @pytest.mark.parametrize(
        ("budget", "levels"),
        [
            (0, [0, 0, 0, 0]),
            (4, [0, 0, 0, 0]),  # 3 would be enough for another, which is less important
            (5, [0, 1, 0, 0]),
            (13, [0, 1, 1, 1]),
            (15, [0, 1, 1, 1]),  # nothing is raised before everything is in
            (16, [1, 1, 1, 1]),
            (19, [1, 2, 1, 1]),
            (26, [2, 2, 2, 2]),
            (32, [2, 3, 2, 2]),
            (46, [3, 3, 3, 3]),
            (10**9, [3, 3, 3, 3]),
        ],
    )
    def test_level_by_level(self, budget, levels):
        assert allocated(self.IMPORTANCE, self.COSTS, budget) == levels

    @pytest.mark.parametrize(
        ("budget", "levels"),
        [
            (13, [0, 1, 1, 1]),
            (19, [1, 2, 1, 1]),
            (24, [1, 2, 1, 1]),
            (25, [1, 3, 1, 1]),
            (27, [1, 3, 2, 1]),
            (46, [3, 3, 3, 3]),
        ],
    )
    def test_component_by_component(self, budget, levels):
        assert allocated(self.IMPORTANCE, self.COSTS, budget, "component") == levels

    def test_among_equals_the_first_counts_more(self):
        assert allocated([0.5] * 4, [SMALL] * 4, 9) == [1, 1, 1, 0]
        assert allocated([0.5] * 4, [SMALL] * 4, 16) == [2, 2, 1, 1]

    def test_importance_that_is_not_finite_is_refused(self):
        with pytest.raises(ValueError, match=r"importance must be finite, got \[nan, 1.0\]"):
            allocated([float("nan"), 1.0], [SMALL, SMALL], 9)


class TestLaws:
    @given(problems(), upgrades)
    def test_the_budget_holds_and_less_than_a_step_is_left(self, problem, upgrade):
        importance, costs, budget = problem
        levels = allocated(importance, costs, budget, upgrade)

        assert spent(levels, costs) <= budget
        left, rows = budget - spent(levels, costs), list(zip(levels, costs, strict=True))
        steps = [row[lv] - (row[lv - 1] if lv else 0) for lv, row in rows if lv < 3]
        assert not steps or left < max(steps)

    @given(problems(), upgrades, st.integers(0, 9))
    def test_more_budget_never_means_fewer_bits(self, problem, upgrade, more):
        importance, costs, budget = problem
        before = allocated(importance, costs, budget, upgrade)
        after = allocated(importance, costs, budget + more, upgrade)

        assert all(a >= b for a, b in zip(after, before, strict=True))

    @given(problems(), upgrades)
    def test_more_importance_never_means_fewer_bits(self, problem, upgrade):
        importance, costs, budget = problem
        levels = allocated(importance, costs, budget, upgrade)

        ranked = sorted(zip(importance, levels, strict=True), reverse=True)
        assert all(a[1] >= b[1] for a in ranked for b in ranked if a[0] > b[0])

    @given(problems(), upgrades, st.integers(0, 6))
    def test_a_component_that_becomes_more_important_never_loses_bits(
        self, problem, upgrade, which
    ):
        importance, costs, budget = problem
        which %= len(importance)
        before = allocated(importance, costs, budget, upgrade)[which]
        importance[which] += 2
        assert allocated(importance, costs, budget, upgrade)[which] >= before
