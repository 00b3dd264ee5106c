"""Salience of transformer blocks, and the bits that it earns them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from causal_factories import CAUSAL, random_pairs
from hypothesis import given
from hypothesis import strategies as st
from training_factories import SPEC, random_rows, rows_of

from hafl_app.training.quantization.block_precision import BaseMemoryError, allocate, salience
from hafl_app.training.quantization.blocks import transformer_blocks
from hafl_app.training.quantization.precisions import PRECISIONS, QuantizationError

SMALL = {"nf4": 10, "int8": 18, "bf16": 34}
LARGE = {"nf4": 20, "int8": 36, "bf16": 68}


def taken(chosen, sizes):
    return sum(size[precision] for size, precision in zip(sizes, chosen, strict=True))


class TestAllocate:
    def test_all_start_with_the_fewest_bits(self):
        assert allocate([0.3, 0.1], [SMALL, SMALL], 20) == ["nf4", "nf4"]
        assert allocate([0.3, 0.1], [SMALL, SMALL], 27) == ["nf4", "nf4"]

    def test_the_most_salient_is_raised_first(self):
        assert allocate([0.1, 0.3, 0.2], [SMALL] * 3, 38) == ["nf4", "int8", "nf4"]
        assert allocate([0.1, 0.3, 0.2], [SMALL] * 3, 46) == ["nf4", "int8", "int8"]

    def test_a_much_more_salient_one_is_raised_twice_first(self):
        # 0.9 for 16 bytes more is worth more than 0.2 for 8
        assert allocate([0.1, 0.9, 0.2], [SMALL] * 3, 54) == ["nf4", "bf16", "nf4"]

    def test_salience_counts_by_byte(self):
        # 0.3 for 16 bytes more is worth less than 0.2 for 8
        assert allocate([0.3, 0.2], [LARGE, SMALL], 46) == ["nf4", "int8"]

    def test_what_does_not_fit_leaves_room_for_what_does(self):
        assert allocate([0.9, 0.1], [LARGE, SMALL], 40) == ["nf4", "int8"]

    def test_a_large_budget_raises_all(self):
        assert allocate([0.0, 0.1], [LARGE, SMALL], 10**9) == ["bf16", "bf16"]

    def test_too_small_a_budget_is_refused(self):
        with pytest.raises(BaseMemoryError, match=r"take 30 MB in nf4, and 29 MB are there"):
            sizes = {name: size * 10**6 for name, size in SMALL.items()}
            allocate([0.1, 0.2, 0.3], [sizes] * 3, 29 * 10**6)

    @given(
        saliences=st.lists(st.floats(0, 2), min_size=1, max_size=6),
        spare=st.integers(0, 200),
        data=st.data(),
    )
    def test_the_budget_is_kept_and_no_raise_left_fits(self, saliences, spare, data):
        sizes = [data.draw(st.sampled_from([SMALL, LARGE])) for _ in saliences]
        budget = taken(["nf4"] * len(sizes), sizes) + spare

        chosen = allocate(saliences, sizes, budget)

        assert taken(chosen, sizes) <= budget
        for block, precision in enumerate(chosen):
            if precision != PRECISIONS[-1]:
                higher = PRECISIONS[PRECISIONS.index(precision) + 1]
                raised = [*chosen[:block], higher, *chosen[block + 1 :]]
                assert taken(raised, sizes) > budget

    @given(
        saliences=st.lists(st.floats(0.01, 2), min_size=2, max_size=6), spare=st.integers(0, 150)
    )
    def test_of_blocks_of_one_size_the_more_salient_gets_no_fewer_bits(self, saliences, spare):
        chosen = allocate(saliences, [SMALL] * len(saliences), 10 * len(saliences) + spare)

        bits = [PRECISIONS.index(precision) for precision in chosen]
        for one, other in itertools.permutations(range(len(bits)), 2):
            if saliences[one] > saliences[other]:
                assert bits[one] >= bits[other]


def batches(model, rows, number=9, size=4):
    starts = range(0, number, size)
    return [model.batch(rows, np.arange(i, min(i + size, number))) for i in starts]


@pytest.mark.parametrize("task", ["classifier", "causal"])
class TestSalience:
    def model_and_rows(self, task):
        spec, rows = (SPEC, random_rows(9)) if task == "classifier" else (CAUSAL, random_pairs(9))
        return spec.build(), rows

    def test_is_the_mean_over_tokens_of_one_minus_the_cosine(self, task):
        model, rows = self.model_and_rows(task)
        total, tokens = np.zeros(2), 0
        model.eval()
        for row in range(9):  # one by one there is no padding
            batch = model.batch(rows, np.array([row]))
            with torch.no_grad():
                output = model.base(batch.input_ids, output_hidden_states=True)
            # The last hidden state of a Llama comes behind a norm, which is no block.
            before, after = output.hidden_states[:2]
            cosine = torch.cosine_similarity(before, after, dim=-1)
            total[0] += float((1 - cosine).sum())
            tokens += batch.input_ids.numel()

        measured = salience(model, batches(model, rows))

        assert len(measured) == 2
        assert measured[0] == pytest.approx(total[0] / tokens, rel=1e-4)

    def test_padding_does_not_count(self, task):
        model, rows = self.model_and_rows(task)

        assert salience(model, batches(model, rows, size=4)) == pytest.approx(
            salience(model, batches(model, rows, size=1)), rel=1e-4
        )

    def test_a_block_that_changes_nothing_has_none(self, task):
        model, rows = self.model_and_rows(task)
        _, block = transformer_blocks(model.base)[1]
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states

        measured = salience(model, batches(model, rows))

        assert measured[1] == pytest.approx(0, abs=1e-6)
        assert measured[0] > 1e-5

    def test_nothing_stays_behind(self, task):
        model, rows = self.model_and_rows(task)
        salience(model, batches(model, rows))

        assert not any(block._forward_hooks for _, block in transformer_blocks(model.base))

    def test_no_texts_are_refused(self, task):
        model, _ = self.model_and_rows(task)

        with pytest.raises(ValueError, match="no texts"):
            salience(model, [])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(QuantizationError, match="Linear has no list of None transformer blocks"):
        transformer_blocks(torch.nn.Linear(3, 5))


def test_it_can_be_measured_on_a_quantized_model():
    model = replace(CAUSAL, base=replace(CAUSAL.base, quantization="bf16")).build()
    rows = random_pairs(9)

    assert salience(model, batches(model, rows)) == pytest.approx(
        salience(CAUSAL.build(), batches(model, rows)), rel=0.05
    )


def test_texts_of_one_token_are_enough():
    model = SPEC.build()

    assert salience(model, [model.batch(rows_of([[5], [7]], [0, 1]), np.arange(2))])[0] > 0
