import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_factories import CPU, random_rows, rows_of

from hafl_app.training.batches import evaluation_batches, make_batch, training_batches


class TestMakeBatch:
    def test_pads_to_the_longest_and_masks_the_padding(self):
        rows = rows_of([[4, 5], [6], [7, 8, 9], [1, 1, 1, 1]], [0, 1, 2, 0])

        batch = make_batch(rows, np.array([2, 0, 1]), CPU)

        assert batch.input_ids.tolist() == [[7, 8, 9], [4, 5, 0], [6, 0, 0]]
        assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
        assert batch.labels.tolist() == [2, 0, 1]
        assert {batch.input_ids.dtype, batch.labels.dtype} == {torch.int64}


class TestTrainingBatches:
    @given(
        number=st.integers(0, 90),
        batch_size=st.integers(1, 7),
        longest=st.integers(1, 9),
        seed=st.integers(0, 99),
    )
    def test_every_row_comes_once(self, number, batch_size, longest, seed):
        rows = random_rows(number, seed, longest)

        batches = list(training_batches(rows, batch_size, np.random.default_rng(seed)))

        assert sorted(np.concatenate([[], *batches])) == list(range(number))
        assert all(1 <= len(batch) <= batch_size for batch in batches)

    def test_lengths_in_a_batch_are_neighbors(self):
        rows = random_rows(64, longest=40)  # sixteen batches of four: one bucket
        lengths = np.diff(rows.offsets)

        spans = sorted(
            (lengths[batch].min(), lengths[batch].max())
            for batch in training_batches(rows, 4, np.random.default_rng(0))
        )

        for (_, longest), (shortest, _) in itertools.pairwise(spans):
            assert longest <= shortest

    def test_batches_are_not_sorted_by_length(self):
        rows = random_rows(64, longest=40)
        batches = training_batches(rows, 4, np.random.default_rng(0))
        means = [np.diff(rows.offsets)[batch].mean() for batch in batches]

        assert means != sorted(means)

    def test_every_epoch_has_another_order_that_follows_from_the_seed(self):
        rows = random_rows(30)

        def epochs(seed):
            rng = np.random.default_rng(seed)
            return [np.concatenate(list(training_batches(rows, 4, rng))).tolist() for _ in range(2)]

        assert epochs(1) == epochs(1)
        assert epochs(1) != epochs(2)
        assert epochs(1)[0] != epochs(1)[1]


class TestEvaluationBatches:
    @given(number=st.integers(0, 40), batch_size=st.integers(1, 7))
    def test_every_row_comes_once_by_length(self, number, batch_size):
        rows = random_rows(number)

        order = np.concatenate([[], *evaluation_batches(rows, batch_size)]).astype(int)

        assert sorted(order) == list(range(number))
        lengths = np.diff(rows.offsets)[order]
        assert (np.diff(lengths) >= 0).all()

    def test_a_row_that_would_pad_those_before_it_too_much_begins_a_batch(self):
        rows = rows_of([[1] * length for length in (9, 2, 3, 2, 9, 30)], [0] * 6)

        def lengths(*limits):
            batches = evaluation_batches(rows, *limits)
            return [np.diff(rows.offsets)[batch].tolist() for batch in batches]

        assert lengths(6) == [[2, 2, 3, 9, 9, 30]]
        # 3 after two of 2 costs 2 tokens, 9 after three costs 18, 30 after two of 9 costs 42.
        assert lengths(6, 41) == [[2, 2, 3, 9, 9], [30]]
        assert lengths(6, 2) == [[2, 2, 3], [9, 9], [30]]
        assert lengths(2, 41) == [[2, 2], [3, 9], [9, 30]]
