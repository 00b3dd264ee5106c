import json

import numpy as np
import pytest

from hafl_app.data import federated
from hafl_app.data.errors import DataError
from hafl_app.data.federated import FederatedText
from hafl_app.data.partition import Partitioning
from hafl_app.data.settings import DatasetSettings, PartitionSettings

NUM_TRAIN, NUM_TEST = 203, 31


class Tokenizer:
    """The number in the text as one token; keeps what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked.append(texts)
        return [[int(text.split()[1])] for text in texts]


@pytest.fixture
def folder(tmp_path):
    for name, first, size in (("train", 0, NUM_TRAIN), ("test", 1000, NUM_TEST)):
        rows = [{"text": f"text {first + i}", "label": i % 4, "user": i % 6} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def make(
    folder,
    kind="dirichlet",
    *,
    seed=3,
    cache=None,
    validation_fraction=0.1,
    holdout_fraction=0.2,
    **changes,
):
    arguments = {"tokenize": Tokenizer(), "tokenizer_key": "k", "cache": cache}
    dataset = DatasetSettings(
        "local",
        path=str(folder),
        validation_fraction=validation_fraction,
        holdout_fraction=holdout_fraction,
    )
    rule = PartitionSettings(kind, column="user", classes_per_partition=2)
    return FederatedText(dataset, Partitioning(rule, 6, seed), **(arguments | changes))


def numbers(encoded):
    return set(encoded.tokens.tolist())


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "natural", "pathological"])
def test_every_row_is_in_one_place(folder, kind):
    text = make(folder, kind)
    parts = [text.validation]
    for partition_id in range(text.num_partitions):
        parts += [text.train(partition_id), text.holdout(partition_id)]

    together = np.concatenate([part.tokens for part in parts])

    assert sorted(together) == list(range(NUM_TRAIN))
    for part in (*parts, text.test):
        assert (part.tokens % 1000 % 4 == part.labels).all()
    if kind == "natural":
        for partition_id in range(6):
            assert {number % 6 for number in numbers(text.train(partition_id))} == {partition_id}


class TestFederatedText:
    def test_sizes(self, folder):
        text = make(folder, "iid")

        # 20 of 203 rows are for validation; 183 = 3 * 31 + 3 * 30, of which 6 are held out each.
        assert len(text.validation) == 20
        assert text.sizes() == [len(text.train(i)) for i in range(6)] == [25, 25, 25, 24, 24, 24]
        assert [len(text.holdout(i)) for i in range(6)] == [6] * 6
        assert np.bincount(text.validation.labels).tolist() == [5, 5, 5, 5]
        assert text.label_names == ("0", "1", "2", "3")
        assert numbers(text.test) == set(range(1000, 1000 + NUM_TEST))

    def test_shares_of_zero(self, folder):
        text = make(folder, validation_fraction=0.0, holdout_fraction=0.0)

        assert len(text.validation) == len(text.holdout(0)) == 0
        assert sum(text.sizes()) == NUM_TRAIN

    def test_sizes_and_names_do_not_tokenize(self, folder):
        text = make(folder, tokenize=None)

        assert len(text.sizes()) == text.num_partitions == 6
        assert len(text.label_names) == 4

    def test_client_never_tokenizes_the_test_set(self, folder):
        tokenizer = Tokenizer()
        text = make(folder, tokenize=tokenizer)

        for partition_id in (2, 3, 2):
            text.train(partition_id)
            text.holdout(partition_id)

        assert [len(texts) for texts in tokenizer.asked] == [NUM_TRAIN]

    def test_loads_and_tokenizes_once(self, folder, monkeypatch):
        loads = []
        load = federated.load_text
        monkeypatch.setattr(federated, "load_text", lambda s: loads.append(s) or load(s))
        tokenizer = Tokenizer()
        text = make(folder, tokenize=tokenizer)

        for _ in range(2):
            assert len(text.test) + len(text.validation) + len(text.train(0)) > 0
            text.sizes()

        assert len(loads) == 1
        assert [len(texts) for texts in tokenizer.asked] == [NUM_TEST, NUM_TRAIN]

    def test_next_process_finds_the_tokens_on_disk(self, folder, tmp_path):
        first = make(folder, cache=tmp_path / "cache")
        second = make(folder, cache=tmp_path / "cache", tokenize=None)

        assert numbers(first.train(1)) == numbers(second.train(1))

    def test_all_follows_from_the_seed(self, folder):
        first, again, other = (make(folder, seed=seed) for seed in (3, 3, 4))

        assert first.train(2).tokens.tolist() == again.train(2).tokens.tolist()
        assert first.holdout(2).tokens.tolist() == again.holdout(2).tokens.tolist()
        assert numbers(first.validation) == numbers(again.validation)
        assert numbers(first.validation) != numbers(other.validation)
        assert numbers(first.holdout(2)) != numbers(other.holdout(2))

    @pytest.mark.parametrize("partition_id", [-1, 6])
    def test_partition_out_of_range(self, folder, partition_id):
        with pytest.raises(DataError, match=rf"partition {partition_id}: expected 0 to 5"):
            make(folder).train(partition_id)
