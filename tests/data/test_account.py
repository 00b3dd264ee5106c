"""Rows kept and dropped, and why; the classes of each client."""

from collections import Counter

import pytest

from hafl_app.data.central import CentralFile
from hafl_app.data.errors import DataError
from hafl_app.data.federated import FederatedText
from hafl_app.data.partition import Partitioning
from hafl_app.data.settings import DatasetSettings, PartitionSettings

LABELS = ["a"] * 31 + ["b"] * 22 + ["c"] * 17


def words(texts):
    return [[len(word) for word in text.split()] for text in texts]


def pairs(prompts, answers, most=6):
    pairs = list(zip(words(prompts), words(answers), strict=True))
    rows = [[*p, *a] for p, a in pairs]
    counts = [[False] * len(p) + [True] * len(a) for p, a in pairs]
    cut = [len(row) > most for row in rows]
    return [row[:most] for row in rows], [mask[:most] for mask in counts], cut


def federated(path, kind="iid", clients=3, *, validation=0.1, most=6, partition=None, **settings):
    return FederatedText(
        DatasetSettings(
            "local",
            path=str(path),
            validation_fraction=validation,
            holdout_fraction=0.2,
            **settings,
        ),
        Partitioning(PartitionSettings(kind, **(partition or {})), clients, 5),
        tokenize=words,
        tokenizer_key="words",
        cache=None,
        tokenize_pairs=lambda p, a: pairs(p, a, most),
    )


@pytest.fixture
def labeled(tmp_path):
    rows = "".join(f"text {i},{label}\n" for i, label in enumerate(LABELS))
    (tmp_path / "train.csv").write_text(f"text,label\n{rows}")
    (tmp_path / "test.csv").write_text("text,label\ntext 0,a\nnew,b\nnewer,c \ntext 69,c\n")
    return tmp_path


@pytest.fixture
def prompts(tmp_path):
    # Prompts of 1 to 8 words: with six tokens a row, those of 6 and more leave no room.
    rows = "".join(f"{'w ' * (1 + i % 8)},word,{'xy'[i % 2]}\n" for i in range(80))
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(f"instruction,output,kind\n{rows}")
    return tmp_path


ASKED = {"answer_column": "output", "template": "{instruction}", "label_column": "kind"}


class TestLabeled:
    def test_rows_and_classes_are_those_that_the_clients_have(self, labeled):
        text = federated(labeled, "dirichlet", partition={"dirichlet_alpha": 1.0})
        account = text.account()

        assert account.label_names == ("a", "b", "c")
        assert (account.read, account.validation, account.test) == (
            {"train": 70, "test": 4}, 7, 4,
        )  # fmt: skip
        assert account.dropped == {}
        for number, client in enumerate(account.clients):
            train = text.train(number)
            named = Counter(account.label_names[label] for label in train.labels)
            assert (client.train, client.labels) == (len(train), dict(named))
            assert client.holdout == len(text.holdout(number))
        together = sum((Counter(client.labels) for client in account.clients), Counter())
        assert account.labels == dict(together)
        assert sum(c.train + c.holdout for c in account.clients) + 7 == 70

    def test_rows_left_out_have_a_reason(self, labeled):
        account = federated(labeled, max_examples=50, max_test_examples=3).account()
        assert account.dropped == {"dataset.max_examples": 20, "dataset.max_test_examples": 1}

        text = federated(
            labeled, "pathological", 2, validation=0.0, partition={"classes_per_partition": 1}
        )
        # Client 0 has class a, client 1 class b: no client has the 17 of c.
        account = text.account()
        assert account.dropped == {"in no partition": 17}
        assert account.labels["c"] == 0
        assert [set(client.labels) for client in account.clients] == [{"a"}, {"b"}]

    def test_notes_say_what_was_changed_and_what_repeats(self, labeled):
        notes = federated(labeled).account().notes

        assert len(notes) == 2
        assert "white space around the label is dropped in 1 row" in notes[0]
        assert notes[1] == "2 test rows have a text that is in the training data"


class TestAnswers:
    def test_rows_without_room_are_counted(self, prompts):
        account = federated(prompts, **ASKED).account()

        # Three prompts of eight have 6 words or more: 30 rows of each file.
        assert account.dropped == {"no room for an answer within dataset.max_length": 60}
        assert account.test == 50
        assert account.validation + sum(c.train + c.holdout for c in account.clients) == 50

    def test_tokens_are_those_that_clients_train_on(self, prompts):
        data = federated(prompts, **ASKED)
        account = data.account()
        trained = [data.train(i) for i in range(3)]
        assert account.tokens == sum(len(rows.tokens) for rows in trained)
        # A word each; the prompt of 5 words and its answer fill the six tokens.
        assert account.answer_tokens == sum(client.train for client in account.clients)
        assert account.cut == 0

    def test_rows_that_lose_a_part_of_their_answer_are_cut(self, prompts):
        text = (prompts / "train.csv").read_text().replace(",word,", ",word word,")
        (prompts / "train.csv").write_text(text)
        data = federated(prompts, **ASKED)
        account = data.account()
        last = sum(int((data.train(i).num_targets == 1).sum()) for i in range(3))
        assert account.cut == last > 0  # prompts of 5 words leave room for one of two

    def test_an_example_is_a_row_of_the_first_client(self, prompts):
        data = federated(prompts, **ASKED)
        assert data.example().tokens.tolist() == data.train(0).row(0).tolist()

    def test_are_not_tokenized_unless_asked(self, prompts):
        account = federated(prompts, most=0, **ASKED).account(by_tokens=False)
        assert (account.test, account.dropped) == (80, {})

    def test_no_room_for_any_is_refused(self, prompts):
        federated(prompts, **ASKED).require_answers()
        with pytest.raises(DataError, match=r"partition 0: none of its .*raise dataset.max_length"):
            federated(prompts, most=1, **ASKED).require_answers()

    def test_no_room_for_any_of_the_test_set_is_refused(self, prompts):
        (prompts / "test.csv").write_text(f"instruction,output,kind\n{'w ' * 9},word,x\n")
        with pytest.raises(DataError, match="none of the 1 test rows keeps a token"):
            federated(prompts, **ASKED).require_answers()


def test_a_server_without_training_data_counts_its_test_rows(labeled):
    text = CentralFile(
        DatasetSettings("on_device", test_path=str(labeled / "test.csv")), ("a", "b", "c"),
        tokenize=words, tokenizer_key="k", cache=None,
    )  # fmt: skip
    account = text.account()

    assert (account.read, account.test, account.clients) == ({"test": 4}, 4, ())
    assert "white space" in account.notes[0]
