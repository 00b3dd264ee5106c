"""Prompts with answers: templates, folders, rows without room for an answer, and partitions."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hafl_app.data.errors import DataError
from hafl_app.data.federated import FederatedText
from hafl_app.data.instructions import read_tasks, share_of_tasks
from hafl_app.data.partition import Partitioning
from hafl_app.data.settings import DatasetSettings, PartitionSettings
from hafl_app.data.sources import load_text
from hafl_app.data.template import columns_of, prompts, render
from hafl_app.data.text import EncodedText, encode_pairs

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TEMPLATE = "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
BY_CLIENT = PartitionSettings("natural", column="client")
PAIRS = {"template": TEMPLATE, "answer_column": "response", "label_column": "category"}
CATEGORIES = ("qa", "poem", "list")


def words(prompts: list[str], answers: list[str], most: int = 12):
    """Tokenize: a word is as long as it is, cut to so many words."""
    pairs = [(p.split(), a.split()) for p, a in zip(prompts, answers, strict=True)]
    rows = [[*map(len, p), *map(len, a)] for p, a in pairs]
    counts = [[False] * len(p) + [True] * len(a) for p, a in pairs]
    cut = [len(row) > most for row in rows]
    return [row[:most] for row in rows], [mask[:most] for mask in counts], cut


def starts_of(rows: EncodedText) -> list[int]:
    """Return where the tokens of each row begin to count."""
    masks = (rows.loss_mask[a:b] for a, b in itertools.pairwise(rows.offsets))
    return [mask.tolist().index(True) for mask in masks]


def row(number: int, **changes: str) -> dict[str, str]:
    return {
        "instruction": f"say {number}",
        "context": "" if number % 3 else "quietly",
        "response": " ".join(["word"] * (1 + number % 4)),
        "category": CATEGORIES[number % 3],
        **changes,
    }


@pytest.fixture
def dolly(tmp_path) -> Path:
    """Return a folder of eleven clients with 20, 21, ... rows, and a test file of 9."""
    start = 0
    for client in range(11):
        rows = [row(start + i) for i in range(20 + client)]
        (tmp_path / f"local_training_{client}.json").write_text(json.dumps(rows))
        start += len(rows)
    (tmp_path / "global_test.json").write_text(json.dumps([row(i) for i in range(9)]))
    return tmp_path


def tasks_in(folder: Path, sizes: dict[str, int], **changes) -> DatasetSettings:
    """Write tasks of these numbers of rows, a file each; return the settings that read them."""
    for name, size in sizes.items():
        instances = [{"input": f"{i}", "output": [f"yes {i}", "no"]} for i in range(size)]
        task = {"Definition": [f"Do {name}."], "Instances": instances}
        (folder / f"{name}.json").write_text(json.dumps(task))
    columns = {"answer_column": "output", "label_column": "task"}
    template = "{definition}\n\n{input}\n"
    return DatasetSettings(
        "natural_instructions", str(folder), template=template, **columns, **changes
    )


def federated(source: DatasetSettings, partitioning: Partitioning, **changes) -> FederatedText:
    options = {
        "tokenize": lambda texts: [[1] for _ in texts],
        "tokenizer_key": "words",
        "cache": None,
        "tokenize_pairs": words,
    }
    return FederatedText(source, partitioning, **{**options, **changes})


class TestFolders:
    """A file that is missing, or of another form, must not make a client less."""

    @pytest.mark.parametrize(
        ("removed", "named"),
        [
            ((3,), "local_training_3.json missing"),
            ((0, 7), "local_training_0.json, local_training_7"),
        ],
    )
    def test_a_missing_client_is_named(self, dolly, removed, named):
        for client in removed:
            (dolly / f"local_training_{client}.json").unlink()
        with pytest.raises(DataError, match=f"{named}.*which has client 10"):
            load_text(DatasetSettings("dolly", path=str(dolly), **PAIRS))

    def test_a_client_twice_is_refused(self, dolly):
        (dolly / "local_training_01.json").write_text(json.dumps([row(1)]))
        with pytest.raises(DataError, match="a client's number occurs twice"):
            load_text(DatasetSettings("dolly", path=str(dolly), **PAIRS))

    @pytest.mark.parametrize(
        ("instances", "match"),
        [
            ([], "a task without instances"),
            ([{"input": "x", "output": []}], "no task of Natural Instructions .IndexError"),
            ([{"input": 5, "output": ["y"]}], "no task of Natural Instructions .TypeError"),
            ([{"input": "x", "output": [["y"]]}], "no task of Natural Instructions .TypeError"),
        ],
    )
    def test_a_task_of_another_form_is_refused(self, tmp_path, instances, match):
        task = {"Definition": ["Do."], "Instances": instances}
        (tmp_path / "task1.json").write_text(json.dumps(task))
        with pytest.raises(DataError, match=match):
            read_tasks(tmp_path)

    def test_a_text_in_place_of_a_list_is_not_its_letters(self, tmp_path):
        task = {"Definition": "Do it.", "Instances": [{"input": "x", "output": "yes"}]}
        (tmp_path / "task1.json").write_text(json.dumps(task))
        assert read_tasks(tmp_path).to_dict("records") == [
            {"task": "task1", "definition": "Do it.", "input": "x", "output": "yes"}
        ]


def test_answers_without_categories_may_stand_in_a_column_named_label(tmp_path):
    rows = [{"instruction": f"say {i}", "label": f"word {i}"} for i in range(20)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    source = DatasetSettings(
        "local", path=str(tmp_path), template="{instruction}", answer_column="label",
        label_column="",
    )  # fmt: skip
    train = load_text(source).train
    assert {r["answer"].split()[1] for r in train} == {r["text"].split()[1] for r in train}
    assert " category" not in train.column_names


def test_a_column_that_no_template_can_name_is_refused():
    table = pd.DataFrame({"my text": ["x"], "other": ["y"]})
    with pytest.raises(DataError, match=r"\{my text\} is not put in; rename the column of f"):
        prompts(table, "{my text} {other}", "f")


class TestTemplate:
    def test_columns_are_put_in(self):
        assert render(TEMPLATE, {"instruction": "Add.", "context": "1 2"}) == (
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
        )

    @pytest.mark.parametrize("blank", ["", "  \n", None, float("nan")])
    def test_a_paragraph_without_content_is_left_out(self, blank):
        assert render(TEMPLATE, {"instruction": "Add.", "context": blank}) == (
            "### Instruction:\nAdd.\n\n### Response:\n"
        )

    def test_values_are_text_and_nothing_else(self):
        # Neither is a value a template, nor does a template reach into a value.
        filled = render("{a} {b}", {"a": "{b} \\1", "b": "x"})
        assert filled == "{b} \\1 x"
        assert render("{a.__class__}{a}", {"a": "x"}) == "{a.__class__}x"

    def test_columns_are_named_once(self):
        assert columns_of("{b} {a} {b}") == ["b", "a"]

    def test_a_column_that_is_not_there_is_named(self):
        table = pd.DataFrame({"instruction": ["a"], "contexts": ["b"]})
        with pytest.raises(DataError, match=r"'context'.*did you mean 'contexts'"):
            prompts(table, TEMPLATE, "mine.jsonl")

    def test_a_template_without_columns_is_refused(self):
        with pytest.raises(DataError, match=r"dataset\.template"):
            columns_of("Answer:")


class TestSources:
    def test_dolly_keeps_its_clients_and_categories(self, dolly):
        text = load_text(DatasetSettings("dolly", str(dolly), **PAIRS))

        train = text.train.to_pandas()
        assert sorted(train["client"].value_counts().items()) == [(i, 20 + i) for i in range(11)]
        assert text.label_names == tuple(sorted(CATEGORIES))
        assert len(text.test) == 9
        first = train[train["instruction"] == "say 3"].iloc[0]
        assert first["text"] == (
            "### Instruction:\nsay 3\n\n### Input:\nquietly\n\n### Response:\n"
        )
        assert first["answer"] == "word word word word"

    def test_an_answer_that_is_blank_is_refused(self, dolly):
        (dolly / "local_training_4.json").write_text(json.dumps([row(1, response=" ")]))
        with pytest.raises(DataError, match="'response' is blank"):
            load_text(DatasetSettings("dolly", str(dolly), **PAIRS))

    def test_another_folder_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="local_training_0"):
            load_text(DatasetSettings("dolly", str(tmp_path), **PAIRS))

    def test_gsm8k_has_one_category(self, tmp_path):
        for split, number in (("train", 5), ("test", 3)):
            lines = [
                json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) for i in range(number)
            ]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
        source = DatasetSettings(
            "gsm8k",
            str(tmp_path),
            template="Q: {question}\nA: ",
            answer_column="answer",
            label_column="",
        )

        text = load_text(source)

        assert (len(text.train), len(text.test), text.label_names) == (5, 3, ("all",))
        assert set(text.test["text"]) == {f"Q: {i}?\nA: " for i in range(3)}

    def test_own_files_with_answers(self, tmp_path):
        file = tmp_path / "mine.jsonl"
        file.write_text("\n".join(json.dumps(row(i)) for i in range(30)))

        text = load_text(DatasetSettings("local", str(file), **PAIRS))

        assert (len(text.train), len(text.test)) == (27, 3)
        assert set(text.train.column_names) >= {"text", "answer", "label", "category"}

    def test_natural_instructions_are_a_task_a_file(self, tmp_path):
        sizes = {"task1_add": 10, "task2_rhyme": 20}
        text = load_text(tasks_in(tmp_path, sizes))

        assert text.label_names == ("task1_add", "task2_rhyme")
        assert (len(text.train), len(text.test)) == (27, 3)
        kept = {(r["text"], r["answer"]) for r in text.train}
        assert len(kept) == 27
        every = {(f"Do {name}.\n\n{i}\n", f"yes {i}") for name in sizes for i in range(sizes[name])}
        assert kept < every

    def test_a_share_of_each_task_is_drawn_by_the_seed(self):
        sizes = {"large": 60, "small": 3, "middle": 20}
        tasks = pd.DataFrame(
            [{"task": task, "input": i} for task, size in sizes.items() for i in range(size)]
        )

        def drawn(fraction: float, seed: int = 0) -> pd.DataFrame:
            return share_of_tasks(tasks, fraction, (seed, 2))

        tenth = drawn(0.1)
        assert dict(tenth["task"].value_counts()) == {"large": 6, "middle": 2, "small": 1}
        assert tenth.equals(drawn(0.1))
        assert tenth.index.is_monotonic_increasing
        assert not tenth.equals(drawn(0.1, seed=1))
        assert set(tenth.index) < set(drawn(0.35).index)
        assert drawn(1.0).equals(tasks)
        assert sorted(tenth["input"]) != [0, 0, 0, 1, 1, 2, 3, 4, 5]  # not the first rows

    def test_the_test_set_comes_out_of_the_share_of_each_task(self, tmp_path):
        text = load_text(tasks_in(tmp_path, {"task0": 40, "task1": 100}, task_fraction=0.5))

        rows = [*text.train["task"], *text.test["task"]]
        assert (rows.count("task0"), rows.count("task1")) == (20, 50)
        assert len(text.test) == 7

    def test_a_file_that_is_no_task_is_refused(self, tmp_path):
        (tmp_path / "task.json").write_text('{"Instances": [{"input": "a"}]}')
        source = DatasetSettings("natural_instructions", str(tmp_path), **PAIRS)
        with pytest.raises(DataError, match=r"task\.json: no task of Natural Instructions"):
            load_text(source)

    def test_a_source_of_labels_has_no_answers(self):
        with pytest.raises(DataError, match="'synthetic' has no answers"):
            load_text(
                DatasetSettings("synthetic", answer_column="response", num_train=40, num_test=20)
            )


class TestFederation:
    def test_a_client_has_its_own_file(self, dolly):
        partitioning = Partitioning(BY_CLIENT, 11, seed=0)
        data = federated(DatasetSettings("dolly", str(dolly), **PAIRS), partitioning)

        owners = data._text.train.select(data._kept_and_validation[0])["client"]
        sizes = [sum(owner == client for owner in owners) for client in range(11)]

        assert [len(p.train) + len(p.holdout) for p in data._parts] == sizes
        assert len(data.validation) == round(0.1 * sum(range(20, 31)))

    def test_categories_can_be_skewed(self, dolly):
        source = DatasetSettings("dolly", str(dolly), **PAIRS)
        partitioning = Partitioning(PartitionSettings("dirichlet", 0.1), 4, seed=1)

        data = federated(source, partitioning)

        shares = [np.bincount(data.train(i).labels, minlength=3) for i in range(4)]
        largest = [share.max() / share.sum() for share in shares]
        assert max(largest) > 0.7  # a third each without skew

    def test_rows_without_room_for_an_answer_are_left_out_and_counted(self, dolly, caplog):
        # A prompt has 6 words, with an input 9: at 8 a third of the rows has no answer left.
        source = DatasetSettings("dolly", str(dolly), **PAIRS)
        data = federated(
            source,
            Partitioning(BY_CLIENT, 11, seed=0),
            tokenize_pairs=lambda p, a: words(p, a, 8),
        )

        with caplog.at_level(logging.WARNING):
            trained = [data.train(i) for i in range(11)]

        assert all(rows.has_answer.all() for rows in trained)
        assert sum(map(len, trained)) < 0.7 * sum(data.sizes())
        total, cut = sum(range(20, 31)), sum(number % 3 == 0 for number in range(275))
        assert f"{cut} of {total} training examples are left out" in caplog.text
        assert len(data.test) == 6

    def test_a_client_of_which_nothing_is_left_is_reported(self, dolly):
        data = federated(
            DatasetSettings("dolly", str(dolly), **PAIRS),
            Partitioning(BY_CLIENT, 11, seed=0),
            tokenize_pairs=lambda p, a: words(p, a, 5),
        )
        with pytest.raises(DataError, match=r"partition 2.*dataset\.max_length"):
            data.train(2)


class TestEncoding:
    def test_the_cache_keeps_where_answers_start(self, tmp_path):
        calls = []

        def tokenize(prompts, answers):
            calls.append(len(prompts))
            return words(prompts, answers)

        first, second = (
            encode_pairs(["a b", "c"], ["d", "e f g"], [1, 0], tokenize, tmp_path, "key")
            for _ in range(2)
        )

        assert calls == [2]
        assert starts_of(first) == starts_of(second) == [2, 1]
        np.testing.assert_array_equal(second.is_cut, first.is_cut)
        np.testing.assert_array_equal(second.tokens, first.tokens)

    def test_what_is_prompt_and_what_is_answer_matters(self, tmp_path):
        encodings = [
            encode_pairs(prompts, answers, [0], words, tmp_path, "key")
            for prompts, answers in ((["a"], ["b c"]), (["a b"], ["c"]))
        ]
        assert [starts_of(e) for e in encodings] == [[1], [2]]

    def test_selected_rows_keep_their_starts(self):
        encoded = encode_pairs(["a b", "c", "d e f"], ["x", "y", "z"], [0, 1, 2], words, None, "k")
        chosen = encoded.select([2, 0])
        assert starts_of(chosen) == [3, 2]
        assert chosen.num_targets.tolist() == [1, 1]

    def test_the_first_token_of_a_row_never_counts(self):
        encoded = encode_pairs(["", "a", ""], ["x y", "z", ""], [0, 0, 0], words, None, "k")
        assert encoded.loss_mask.tolist() == [False, True, False, True]
        assert encoded.num_targets.tolist() == [1, 1, 0]
        assert encoded.has_answer.tolist() == [True, True, False]

    def test_a_tokenizer_says_of_every_token_whether_it_counts(self):
        def careless(prompts, answers):
            rows, counts, cut = words(prompts, answers)
            return rows, [mask[:-1] for mask in counts], cut

        with pytest.raises(DataError, match="every token"):
            encode_pairs(["a"], ["b"], [0], careless, None, "k")

    def test_an_answer_for_every_prompt(self):
        with pytest.raises(DataError, match="1 answers for 2 prompts"):
            encode_pairs(["a", "b"], ["c"], [0, 0], words, None, "k")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
class TestRealData:
    def test_dollys_ten_clients(self):
        text = load_text(DatasetSettings("dolly", str(SHARED / "dolly15k_10clients"), **PAIRS))

        clients = text.train.to_pandas()["client"]
        assert (len(text.train), len(text.test), len(text.label_names)) == (14931, 80, 8)
        assert (clients.nunique(), clients.value_counts().min()) == (10, 443)

    def test_dolly_as_conversations(self):
        source = DatasetSettings(
            "dolly",
            str(SHARED / "dolly15k_10clients"),
            format="instruction",
            label_column="category",
        )
        text = load_text(source)
        assert (len(text.train), len(text.test), len(text.label_names)) == (14931, 80, 8)
        assert {"text", "answer", "label", "client", "category"} == set(text.train.column_names)
        assert [m["role"] for m in text.train[0]["text"]] == ["user"]

    def test_gsm8k(self):
        source = DatasetSettings(
            "gsm8k",
            str(SHARED / "gsm8k"),
            template="{question}\n",
            answer_column="answer",
            label_column="",
        )
        text = load_text(source)
        assert (len(text.train), len(text.test)) == (7473, 1319)
        assert all("####" in answer for answer in text.test["answer"])
