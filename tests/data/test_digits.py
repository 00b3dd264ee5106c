"""The digits: what they are, how they are split and shared out, and skew of their classes."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hafl_app.data.digits import read_digits
from hafl_app.data.errors import DataError
from hafl_app.data.federated import FederatedText
from hafl_app.data.images import encode_images
from hafl_app.data.partition import Partitioning
from hafl_app.data.settings import DatasetSettings, PartitionSettings

NUM_TEST = 359  # a fifth of 1,797


def make(kind="iid", *, data_seed=0, seed=3, max_examples=None, **partitioning):
    def tokenize(texts):
        raise AssertionError("there is no text")

    return FederatedText(
        DatasetSettings(
            "digits", data_seed=data_seed, max_examples=max_examples, holdout_fraction=0.2
        ),
        Partitioning(PartitionSettings(kind, **partitioning), 6, seed),
        tokenize=tokenize,
        tokenizer_key="k",
        cache=None,
    )


def all_parts(data):
    parts = [data.validation, data.test]
    for partition_id in range(data.num_partitions):
        parts += [data.train(partition_id), data.holdout(partition_id)]
    return parts


def label_counts(data):
    return [np.bincount(data.train(i).labels, minlength=10) for i in range(6)]


def keys(images):
    """Return images as bytes with their labels, to find them again."""
    return sorted(zip(map(bytes, images.pixels), images.labels.tolist(), strict=True))


class TestDigits:
    def test_are_scikit_learns_from_minus_one_to_one(self):
        table, digits = read_digits(), load_digits()

        pixels = np.array(table["pixels"].tolist())

        assert pixels.shape == (1797, 1, 8, 8)
        assert (pixels.min(), pixels.max()) == (-1, 1)
        np.testing.assert_array_equal((pixels[:, 0] + 1) * 8, digits.images)
        assert table["label"].tolist() == [str(digit) for digit in digits.target]

    def test_the_names_of_the_classes_are_the_digits(self):
        assert make().label_names == tuple("0123456789")

    @pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
    def test_every_image_is_in_one_place_with_its_label(self, kind):
        digits = load_digits()
        pixels = (digits.images[:, None] / 8 - 1).astype(np.float32)

        parts = all_parts(make(kind))

        found = sorted(key for part in parts for key in keys(part))
        assert found == keys(encode_images(pixels, digits.target))
        assert {part.pixels.dtype for part in parts} == {np.dtype(np.float32)}
        assert {part.pixels.shape[1:] for part in parts} == {(1, 8, 8)}

    def test_the_test_set_is_balanced_and_follows_from_data_seed_alone(self):
        test = make().test

        assert len(test) == NUM_TEST
        assert set(np.bincount(test.labels)) <= {35, 36, 37}
        assert keys(make("dirichlet", seed=8).test) == keys(test)
        assert keys(make(data_seed=1).test) != keys(test)

    def test_a_subset_can_be_asked_for(self):
        data = make(max_examples=100)
        assert sum(len(part) for part in all_parts(data)) == 100 + NUM_TEST

    def test_dirichlet_skews_the_classes(self):
        skewed = label_counts(make("dirichlet", dirichlet_alpha=0.2))
        even = label_counts(make("iid"))
        assert max(c.max() / c.sum() for c in skewed) > 0.4
        assert max(c.max() / c.sum() for c in even) < 0.2

    def test_pathological_shares_have_a_few_classes_each(self):
        counts = label_counts(make("pathological", classes_per_partition=2))
        assert [np.count_nonzero(c) for c in counts] == [2] * 6


class TestEncodedImages:
    def images(self, number=7):
        rng = np.random.default_rng(0)
        pixels = rng.normal(size=(number, 2, 4, 3)).astype(np.float32)
        return encode_images(pixels.tolist(), rng.integers(0, 5, number))

    def test_select_copies_rows_in_the_order_given(self):
        images = self.images()

        some = images.select([5, 0, 5])

        np.testing.assert_array_equal(some.pixels, images.pixels[[5, 0, 5]])
        assert some.labels.tolist() == images.labels[[5, 0, 5]].tolist()
        assert some.lengths.tolist() == [0, 0, 0]
        some.pixels[:] = 0
        assert images.pixels.any()

    @pytest.mark.parametrize("row", [-1, 7])
    def test_select_refuses_rows_that_are_not_there(self, row):
        with pytest.raises(IndexError, match="expected 0 to 6"):
            self.images().select([2, row])

    def test_all_of_them_count(self):
        images = self.images()
        assert images.with_answers() is images
        assert len(images.select([])) == 0

    @pytest.mark.parametrize(
        ("pixels", "labels", "message"),
        [
            (np.zeros((3, 1, 4, 2)), [0, 1], "labels of shape"),
            (np.zeros((3, 4, 2)), [0, 1, 0], r"shape \(4, 2\), expected \(channels"),
            ([[[[1.0, 2.0]]], [[[1.0]]]], [0, 1], "different shapes"),
        ],
    )
    def test_images_that_are_none_are_refused(self, pixels, labels, message):
        with pytest.raises(DataError, match=message):
            encode_images(pixels, labels)
