import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowrank_factories import IN, OUT, assert_same_bits, copy, dense, random_factors, seeded

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.importance import (
    SensitivityAverages,
    component_scores,
    contribution_scores,
    magnitude_scores,
    round_sensitivity,
    select_components,
    select_over_model,
    sensitivity,
)

RANK = 3
KINDS = ["sensitivity", "smoothed", "adalora"]


def constant(lora_A, lora_B):
    """Return sensitivities of rank len(lora_A), constant along each row and column."""
    return LoraFactors(
        torch.tensor(lora_A, dtype=torch.float64)[:, None].expand(-1, IN),
        torch.tensor(lora_B, dtype=torch.float64).expand(OUT, -1),
    )


def absolute(factors):
    return LoraFactors(factors.lora_A.abs(), factors.lora_B.abs())


def averages_after(steps, like, beta1=0.85, beta2=0.85):
    averages = SensitivityAverages.zeros(like, beta1, beta2)
    for step in steps:
        averages = averages.update(step)
    return averages


class TestSensitivity:
    def test_is_the_absolute_product_and_detached(self):
        factors, gradients = random_factors(RANK, 0), random_factors(RANK, 1)
        factors.lora_A.requires_grad_()

        result = sensitivity(factors, gradients)

        assert torch.equal(result.lora_A, (factors.lora_A * gradients.lora_A).detach().abs())
        assert torch.equal(result.lora_B, (factors.lora_B * gradients.lora_B).abs())
        assert not result.lora_A.requires_grad

    def test_a_step_of_sgd_gives_the_sensitivity_of_its_gradient(self):
        before, gradients = random_factors(RANK, 0), random_factors(RANK, 1)
        eta, ratio = 0.1, 5.0
        after = LoraFactors(
            before.lora_A - eta * gradients.lora_A, before.lora_B - eta * ratio * gradients.lora_B
        )

        result = round_sensitivity(before, after, eta, lora_B_lr_ratio=ratio)

        expected = sensitivity(before, gradients)
        torch.testing.assert_close(result.lora_A, expected.lora_A)
        torch.testing.assert_close(result.lora_B, expected.lora_B)


class TestSensitivityAverages:
    def test_three_steps_written_out(self):
        """One component; lora_A sees I = 4, 8, 2 and lora_B 0; beta1 = 0.5, beta2 = 0.75.

        Ibar: 2; 1 + 4 = 5; 2.5 + 1 = 3.5. Ubar: |4 - 2| / 4 = 0.5;
        0.375 + |8 - 5| / 4 = 1.125; 0.84375 + |2 - 3.5| / 4 = 1.21875.
        """
        steps = [constant([i], [0.0]) for i in (4.0, 8.0, 2.0)]

        averages = averages_after(steps, steps[0], beta1=0.5, beta2=0.75)

        assert averages.smoothed.lora_A[0].tolist() == [3.5] * IN
        assert averages.uncertainty.lora_A[0].tolist() == [1.21875] * IN
        assert component_scores(averages, "sensitivity").item() == pytest.approx(14 / 3)
        assert component_scores(averages, "smoothed").item() == 3.5
        assert component_scores(averages, "adalora").item() == 3.5 * 1.21875
        corrected = component_scores(averages, "smoothed", bias_correction=True).item()
        assert corrected == pytest.approx(3.5 / (1 - 0.5**3))
        corrected = component_scores(averages, "adalora", bias_correction=True).item()
        assert corrected == pytest.approx(3.5 * 1.21875 / (1 - 0.5**3) / (1 - 0.75**3))

    @given(steps=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
    def test_recursion_of_every_parameter(self, steps, seed):
        updates = [absolute(random_factors(RANK, seed + t)) for t in range(steps)]
        smoothed = uncertainty = torch.zeros(OUT, RANK, dtype=torch.float64)
        for update in updates:
            smoothed = 0.9 * smoothed + 0.1 * update.lora_B
            uncertainty = 0.7 * uncertainty + 0.3 * (update.lora_B - smoothed).abs()

        averages = averages_after(updates, updates[0], beta1=0.9, beta2=0.7)

        torch.testing.assert_close(averages.smoothed.lora_B, smoothed)
        torch.testing.assert_close(averages.uncertainty.lora_B, uncertainty)
        assert averages.steps.tolist() == [steps] * RANK

    def test_agrees_with_adalora_in_peft(self):
        layer = pytest.importorskip("peft.tuners.adalora.layer")
        factors = random_factors(RANK, 0)
        parameters = {
            "lora_A.default": torch.nn.Parameter(factors.lora_A.clone()),
            "lora_B.default": torch.nn.Parameter(factors.lora_B.clone()),
        }
        model = SimpleNamespace(named_parameters=parameters.items)
        allocator = object.__new__(layer.RankAllocator)  # its constructor wants a whole model
        allocator.beta1, allocator.beta2, allocator.adapter_name = 0.85, 0.6, "default"
        allocator.reset_ipt()
        averages = SensitivityAverages.zeros(factors, 0.85, 0.6)

        for step in range(3):
            gradients = random_factors(RANK, 10 + step)
            parameters["lora_A.default"].grad = gradients.lora_A
            parameters["lora_B.default"].grad = gradients.lora_B
            allocator.update_ipt(model)
            averages = averages.update(sensitivity(factors, gradients))

        rows = allocator._element_score("lora_A.default").mean(dim=1)
        columns = allocator._element_score("lora_B.default").mean(dim=0)
        torch.testing.assert_close(component_scores(averages, "adalora"), rows + columns)

    @pytest.mark.parametrize("kind", KINDS)
    def test_frozen_scores_do_not_decay(self, kind):
        averages = averages_after([absolute(random_factors(RANK, 0))], random_factors(RANK, 0))
        before = component_scores(averages, kind)

        for step in range(5):
            averages = averages.update(absolute(random_factors(2, 1 + step)), [2, 0])

        after = component_scores(averages, kind)
        assert after[1] == before[1] > 0
        assert after[0] != before[0]
        assert averages.steps.tolist() == [6, 1, 6]

    def test_indices_name_the_components(self):
        part = absolute(random_factors(2, 1))
        zeros = SensitivityAverages.zeros(random_factors(RANK, 0))

        scores = component_scores(zeros.update(part, [2, 0]), "smoothed")

        alone = component_scores(SensitivityAverages.zeros(part).update(part), "smoothed")
        assert scores.tolist() == [alone[1].item(), 0.0, alone[0].item()]

    @pytest.mark.parametrize("kind", ["sensitivity", "smoothed"])
    def test_clients_with_different_numbers_of_steps_are_comparable(self, kind):
        step = constant([1.0, 2.0], [3.0, 0.5])

        for count in (1, 4, 30):
            scores = component_scores(
                averages_after([step] * count, step), kind, bias_correction=True
            )
            torch.testing.assert_close(scores, torch.tensor([4.0, 2.5], dtype=torch.float64))

    def test_without_correction_short_training_scores_lower(self):
        step = constant([1.0], [3.0])

        short = component_scores(averages_after([step], step), "smoothed")

        assert short.item() == pytest.approx(0.15 * 4.0)  # 1 - beta1 of the true value

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bias_correction", [True, False])
    def test_no_update_scores_zero(self, kind, bias_correction):
        averages = SensitivityAverages.zeros(random_factors(RANK, 0))

        scores = component_scores(averages, kind, bias_correction=bias_correction)

        assert scores.tolist() == [0.0] * RANK

    def test_score_is_the_mean_over_row_and_column(self):
        """Means, not sums: rows of IN and columns of OUT weigh the same."""
        step = constant([1.0, 0.0], [0.0, 1.0])

        scores = component_scores(averages_after([step], step), "sensitivity")

        assert scores.tolist() == [1.0, 1.0]

    def test_tiny_sensitivities_keep_their_order(self):
        """The product of two averages near 1e-25 is below float32."""
        small = constant([1e-25, 2e-25], [0.0, 0.0])
        step = LoraFactors(small.lora_A.float(), small.lora_B.float())

        scores = component_scores(averages_after([step], step), "adalora")

        assert scores[1] > scores[0] > 0

    @pytest.mark.parametrize(
        ("dtype", "state"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
    )
    def test_state_is_float32_or_wider(self, dtype, state):
        step = absolute(random_factors(RANK, 0, dtype=dtype))

        averages = averages_after([step], step)

        assert averages.smoothed.lora_A.dtype == averages.uncertainty.lora_B.dtype == state

    def test_nothing_is_changed_in_place(self):
        step, part = absolute(random_factors(RANK, 0)), absolute(random_factors(1, 1))
        step_before, part_before = copy(step), copy(part)
        averages = averages_after([step], step)
        smoothed = copy(averages.smoothed)

        averages.update(part, [1])
        averages.update(step)

        assert_same_bits(step, step_before)
        assert_same_bits(part, part_before)
        assert_same_bits(averages.smoothed, smoothed)
        assert averages.steps.tolist() == [1] * RANK

    @pytest.mark.parametrize("indices", [(0,), (1, 1), None])
    def test_wrong_indices_are_refused(self, indices):
        averages = SensitivityAverages.zeros(random_factors(RANK, 0))

        with pytest.raises(ValueError, match="indices"):
            averages.update(absolute(random_factors(2, 0)), indices)

    @pytest.mark.parametrize("betas", [(1.0, 0.5), (0.5, -0.1)])
    def test_decays_out_of_range_are_refused(self, betas):
        with pytest.raises(ValueError, match="decays"):
            SensitivityAverages.zeros(random_factors(RANK, 0), *betas)


class TestOtherScores:
    def test_magnitude_is_the_norm_of_each_component(self):
        factors = random_factors(RANK, 0)

        expected = [dense(factors.select([i])).norm().item() for i in range(RANK)]

        assert magnitude_scores(factors).tolist() == pytest.approx(expected)

    def test_contribution_is_the_norm_of_each_change_while_lora_a_is_frozen(self):
        before = random_factors(RANK, 0)
        after = LoraFactors(before.lora_A, random_factors(RANK, 1).lora_B)

        expected = [
            (dense(after.select([i])) - dense(before.select([i]))).norm().item()
            for i in range(RANK)
        ]

        assert contribution_scores(before, after).tolist() == pytest.approx(expected)

    def test_contribution_takes_the_row_after_training(self):
        before, after = random_factors(RANK, 0), random_factors(RANK, 1)

        doubled = LoraFactors(2 * after.lora_A, after.lora_B)

        torch.testing.assert_close(
            contribution_scores(before, doubled), 2 * contribution_scores(before, after)
        )


class TestSelectComponents:
    @given(scores=st.lists(st.floats(0, 10), max_size=12), data=st.data())
    def test_takes_the_best(self, scores, data):
        count = data.draw(st.integers(0, len(scores)))
        values = torch.tensor(scores, dtype=torch.float64)

        chosen = select_components(values, count, generator=seeded(0))

        assert len(chosen) == len(set(chosen)) == count
        assert list(chosen) == sorted(chosen)
        expected = sorted(scores, reverse=True)[:count]
        assert sorted((scores[i] for i in chosen), reverse=True) == expected

    def test_ties_are_random_and_follow_the_seed(self):
        ties = torch.ones(8)

        picks = [select_components(ties, 3, generator=seeded(s)) for s in range(400)]

        again = [select_components(ties, 3, generator=seeded(s)) for s in range(400)]
        assert picks == again
        counts = Counter(i for pick in picks for i in pick)
        # Each of 8 in 3 of 8 picks: 150 of 400, standard deviation 9.7; 5 of them either way.
        assert all(100 < counts[i] < 200 for i in range(8))

    def test_ties_at_the_border_only(self):
        scores = torch.tensor([1.0, 5.0, 1.0, 1.0, 7.0])

        picks = {select_components(scores, 3, generator=seeded(s)) for s in range(50)}

        assert picks == {(0, 1, 4), (1, 2, 4), (1, 3, 4)}

    def test_exploration_brings_frozen_components_back(self):
        scores = torch.arange(10.0)

        without = {select_components(scores, 4, generator=seeded(s)) for s in range(50)}
        with_half = [
            select_components(scores, 4, explore=0.5, generator=seeded(s)) for s in range(200)
        ]

        assert without == {(6, 7, 8, 9)}
        assert all({8, 9} <= set(pick) and len(pick) == 4 for pick in with_half)
        assert {i for pick in with_half for i in pick} == set(range(10))

    def test_share_of_chance_is_right_on_average(self):
        """A tenth of one slot: chance takes it in 10 % of the draws, and then any of 10."""
        scores = torch.arange(10.0)

        picks = [
            select_components(scores, 1, explore=0.1, generator=seeded(s)) for s in range(3000)
        ]

        others = sum(pick != (9,) for pick in picks)
        # 3000 * 0.1 * 0.9 = 270, standard deviation 15.7.
        assert 200 < others < 340

    def test_all_left_to_chance_ignores_the_scores(self):
        scores = torch.arange(10.0)

        picks = [select_components(scores, 2, explore=1.0, generator=seeded(s)) for s in range(500)]

        counts = Counter(i for pick in picks for i in pick)
        # Each of 10 in 2 of 10 picks: 100 of 500, standard deviation 8.9.
        assert all(55 < counts[i] < 145 for i in range(10))

    @pytest.mark.parametrize("count", [-1, 4])
    def test_count_out_of_range(self, count):
        with pytest.raises(ValueError, match="count must be in"):
            select_components(torch.ones(3), count, generator=seeded(0))

    @pytest.mark.parametrize("explore", [-0.1, 1.1, math.nan])
    def test_explore_out_of_range(self, explore):
        with pytest.raises(ValueError, match="explore must be in"):
            select_components(torch.ones(3), 1, explore=explore, generator=seeded(0))

    def test_scores_must_be_finite(self):
        with pytest.raises(ValueError, match="finite"):
            select_components(torch.tensor([1.0, math.nan]), 1, generator=seeded(0))


class TestSelectOverModel:
    SCORES = {  # noqa: RUF012
        "value": torch.tensor([5.0, 0.1, 4.0]),
        "query": torch.tensor([0.2, 0.3]),
        "dense": torch.tensor([3.0, 0.4, 0.5, 6.0]),
    }

    def test_takes_the_best_pairs_and_a_module_may_get_none(self):
        chosen = select_over_model(self.SCORES, 4, generator=seeded(0))

        assert chosen == {"value": (0, 2), "query": (), "dense": (0, 3)}

    @given(total=st.integers(0, 9), explore=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
    def test_has_the_total_asked_for_whatever_the_order(self, total, explore, seed):
        chosen = select_over_model(self.SCORES, total, explore=explore, generator=seeded(seed))

        backwards = dict(reversed(self.SCORES.items()))
        again = select_over_model(backwards, total, explore=explore, generator=seeded(seed))
        assert chosen == again
        assert list(chosen) == list(self.SCORES)
        assert sum(len(indices) for indices in chosen.values()) == total
        for name, indices in chosen.items():
            assert set(indices) <= set(range(len(self.SCORES[name])))
            assert list(indices) == sorted(set(indices))

    def test_ties_are_random_over_the_model(self):
        ties = {name: torch.zeros_like(scores) for name, scores in self.SCORES.items()}

        picks = [select_over_model(ties, 3, generator=seeded(s)) for s in range(100)]

        seen = {(name, i) for pick in picks for name, indices in pick.items() for i in indices}
        assert len(seen) == 9

    def test_total_out_of_range(self):
        with pytest.raises(ValueError, match="count must be in"):
            select_over_model(self.SCORES, 10, generator=seeded(0))
