import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hafl_app.data.partition import Partitioning, partition, split_off
from hafl_app.data.settings import PartitionSettings
from hafl_app.data.sources import DataError

LABELS = np.repeat(np.arange(6), [30, 50, 40, 60, 20, 50])  # unequal, 250 in all
USERS = [f"user{i % 7}" for i in range(len(LABELS))]
TRAIN = Dataset.from_dict({"text": ["x"] * len(LABELS), "label": LABELS, "user": USERS})


def share(kind, num_partitions=7, seed=0, **settings):
    rule = PartitionSettings(kind, column="user", **settings)
    return partition(TRAIN, Partitioning(rule, num_partitions, seed))


KINDS = ["iid", "dirichlet", "pathological", "natural"]


class TestPartition:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", [0, 1, 2**31])
    def test_no_row_twice_and_none_made_up(self, kind, seed):
        rows = np.concatenate(share(kind, seed=seed))

        assert len(set(rows.tolist())) == len(rows)
        assert set(rows.tolist()) <= set(range(len(LABELS)))
        if kind != "pathological":
            assert len(rows) == len(LABELS)

    @pytest.mark.parametrize("kind", KINDS)
    def test_follows_from_the_seed(self, kind):
        first, again, other = (share(kind, seed=seed) for seed in (3, 3, 4))

        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        same = all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
        assert same == (kind == "natural")

    def test_iid_shares_are_equal_and_mixed(self):
        partitions = share("iid")

        # 250 = 7 * 35 + 5
        assert sorted(map(len, partitions)) == [35, 35, 36, 36, 36, 36, 36]
        assert all(len(set(LABELS[rows])) >= 5 for rows in partitions)

    def test_dirichlet_alpha_rules_the_skew(self):
        def largest_class_share(dirichlet_alpha):
            partitions = share("dirichlet", dirichlet_alpha=dirichlet_alpha)
            counts = [np.bincount(LABELS[rows], minlength=6) for rows in partitions]
            return np.mean([count.max() / count.sum() for count in counts])

        # 60 of 250 rows are of the largest class: 0.24 without skew.
        assert largest_class_share(1000.0) < 0.3
        assert largest_class_share(0.2) > 0.5

    @pytest.mark.parametrize("classes", [1, 3, 6])
    def test_pathological_has_the_classes_asked_for(self, classes):
        partitions = share("pathological", classes_per_partition=classes)

        assert all(len(set(LABELS[rows])) == classes for rows in partitions)
        assert sum(map(len, partitions)) == len(LABELS)  # 7 partitions name all 6 classes

    def test_natural_is_one_owner_each(self):
        owners = [{USERS[row] for row in rows} for rows in share("natural")]

        assert owners == [{f"user{i}"} for i in range(7)]

    def test_nothing_is_printed(self, capfd, recwarn):
        for kind in KINDS:
            share(kind)

        assert capfd.readouterr() == ("", "")
        assert not recwarn.list

    def test_unused_rows_are_logged(self, caplog):
        partitions = share("pathological", num_partitions=2, classes_per_partition=1)

        # The first classes, 30 and 50 rows.
        assert [len(rows) for rows in partitions] == [30, 50]
        assert "170 of 250 training examples are in no partition" in caplog.text

    @pytest.mark.parametrize(
        ("kind", "settings", "expected"),
        [
            ("iid", {"num_partitions": 251}, "251 clients cannot share 250 training examples"),
            ("natural", {"num_partitions": 0}, "num_clients: 0 clients"),
            ("iid", {"num_partitions": 100}, "partition 0 of 100 .iid. has 3 examples, fewer"),
            ("dirichlet", {"dirichlet_alpha": 1e-3}, "dirichlet_alpha=0.001 gave each of 7"),
            ("pathological", {"classes_per_partition": 7}, "7 is not between 1 and the 6 classes"),
            ("pathological", {"classes_per_partition": 0}, "0 is not between 1 and the 6 classes"),
            (
                "pathological",
                {"num_partitions": 150, "classes_per_partition": 1},
                "150 clients with 1 of 6 classes each need a class more often",
            ),
            ("natural", {"num_partitions": 5}, "'user' has 7 different ids.*num_clients=7"),
            ("natrual", {}, "'natrual' is none of.*did you mean 'natural'"),
        ],
    )
    def test_refusals(self, kind, settings, expected):
        with pytest.raises(DataError, match=expected):
            share(kind, **settings)

    def test_natural_column(self):
        with pytest.raises(DataError, match="'usr', only text, label, user; did you mean 'user'"):
            partition(TRAIN, Partitioning(PartitionSettings("natural", column="usr"), 7, 0))
        with pytest.raises(DataError, match="needs the column of owners, one of text, label, user"):
            partition(TRAIN, Partitioning(PartitionSettings("natural"), 7, 0))
        holes = Dataset.from_dict({"label": [0, 1, 0], "user": ["a", None, None]})
        with pytest.raises(DataError, match="'user' is empty in 2 rows"):
            partition(holes, Partitioning(PartitionSettings("natural", column="user"), 2, 0))

    def test_natural_ids_may_be_integers(self):
        train = Dataset.from_dict({"label": [0] * 12, "user": [10, 9, 2] * 4})

        partitions = partition(
            train, Partitioning(PartitionSettings("natural", column="user"), 3, 0)
        )

        assert [row.tolist() for row in partitions] == [[2, 5, 8, 11], [1, 4, 7, 10], [0, 3, 6, 9]]


class TestSplitOff:
    @given(
        n=st.integers(0, 60),
        fraction=st.floats(0, 1, exclude_max=True),
        seed=st.integers(0, 2**32 - 1),
        classes=st.integers(1, 70),
    )
    @settings(max_examples=150, deadline=None)
    def test_size_and_completeness(self, n, fraction, seed, classes):
        indices = np.arange(n) * 3 + 100
        labels = np.random.default_rng(seed).integers(classes, size=n) if classes < 60 else None

        kept, split = split_off(indices, fraction, seed, labels)

        assert sorted([*kept, *split]) == indices.tolist()
        if fraction == 0 or n < 2:
            assert len(split) == 0
        else:
            assert 1 <= len(split) <= n - 1
            assert abs(len(split) - fraction * n) <= 1

    @given(
        counts=st.lists(st.integers(1, 30), min_size=2, max_size=6),
        fraction=st.floats(0.05, 0.95),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=100, deadline=None)
    def test_every_class_gives_its_share(self, counts, fraction, seed):
        labels = np.repeat(np.arange(len(counts)), counts)
        rows = np.random.default_rng(seed).permutation(len(labels))

        _, split = split_off(rows, fraction, seed, labels[rows])

        taken = np.bincount(labels[split], minlength=len(counts)) / np.array(counts)
        # To within a row: the shares of two classes differ by at most half a row of each, and the
        # last row served.
        slack = 1 / np.array(counts)
        assert (taken.max() - taken.min()) <= slack[taken.argmax()] + slack[taken.argmin()]

    def test_the_only_row_of_a_class_is_kept(self):
        labels = np.array([0] * 20 + list(range(1, 11)))

        kept, split = split_off(np.arange(30), 0.1, 0, labels)

        assert len(split) == 3
        assert set(labels[kept]) == set(range(11))

    def test_never_all_and_never_none(self):
        assert [len(part) for part in split_off(range(5), 0.99, 0)] == [1, 4]
        assert [len(part) for part in split_off(range(5), 0.01, 0)] == [4, 1]

    def test_seeded(self):
        rows = np.arange(50)

        def split(seed):
            return split_off(rows, 0.2, seed)[1].tolist()

        assert split(1) == split(1) != split(2)
        assert split((1, 2)) != split((1, 3))
        assert split(1) != rows[:10].tolist()

    def test_refusals(self):
        with pytest.raises(DataError, match=r"is 1\.0, expected"):
            split_off([1, 2], 1.0, 0)
        with pytest.raises(DataError, match="1 labels for 2 rows"):
            split_off([1, 2], 0.5, 0, [1])
