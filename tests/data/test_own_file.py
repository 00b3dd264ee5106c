import csv
import io
import json

import numpy as np
import pandas as pd
import pytest

from hafl_app.data.central import CentralFile, central_label_names
from hafl_app.data.errors import DataError, UnfitDataError
from hafl_app.data.labels import LONGEST_LABEL, MOST_LABELS, label_fault, union_of_labels
from hafl_app.data.own_file import OwnFile, OwnText
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.sources import load_text

# The number in the text is its token.
ROWS = [{"text": f"text {i}", "label": "aabab"[i % 5] if i % 4 else "c"} for i in range(23)]
CLASSES = ("c", "a", "other", "b")


class Tokenizer:
    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked.append(texts)
        return [[int(text.split()[1])] for text in texts]


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows):
    out = io.BytesIO()
    pd.DataFrame(rows).to_parquet(out)
    return out.getvalue()


def own(path, *, holdout_fraction=0.2, seed=3, tokenize=None, cache=None, **settings):
    return OwnText(
        OwnFile(str(path), **settings),
        holdout_fraction=holdout_fraction,
        seed=seed,
        tokenize=tokenize or Tokenizer(),
        tokenizer_key="k",
        cache=cache,
    )


def write(tmp_path, rows, name="my.jsonl"):
    path = tmp_path / name
    path.write_bytes(as_jsonl(rows))
    return path


def numbers(encoded):
    return encoded.tokens.tolist()


class TestShare:
    @pytest.mark.parametrize(
        ("name", "write_as"),
        [("my.csv", as_csv), ("my.jsonl", as_jsonl), ("my.parquet", as_parquet)],
    )
    def test_every_format_gives_the_same_rows_and_classes(self, tmp_path, name, write_as):
        (tmp_path / name).write_bytes(write_as(ROWS))

        share = own(tmp_path / name).share()

        # A fifth of 23 rows, rounded, is held out.
        assert share.label_names == ("a", "b", "c")
        assert (share.num_examples, len(share.holdout())) == (18, 5)
        together = numbers(share.train()) + numbers(share.holdout())
        assert sorted(together) == list(range(23))

    def test_labels_are_those_of_the_run(self, tmp_path):
        share = own(write(tmp_path, ROWS)).share(CLASSES)

        assert share.label_names == CLASSES
        for part in (share.train(), share.holdout()):
            names = [CLASSES[label] for label in part.labels]
            assert names == [ROWS[number]["label"] for number in numbers(part)]

    def test_one_class_is_enough_if_the_run_has_more(self, tmp_path):
        rows = [row for row in ROWS if row["label"] == "b"]

        share = own(write(tmp_path, rows)).share(CLASSES)

        assert set(share.train().labels.tolist()) == {CLASSES.index("b")}

    def test_the_held_out_rows_follow_from_seed_and_file_alone(self, tmp_path):
        path = write(tmp_path, ROWS)

        first, again, other = (own(path, seed=seed).share(CLASSES) for seed in (3, 3, 4))

        assert numbers(first.holdout()) == numbers(again.holdout())
        assert set(numbers(first.holdout())) != set(numbers(other.holdout()))
        # Whatever the classes: no row may move from the held-out ones to the others in a run.
        assert numbers(own(path).share().holdout()) == numbers(first.holdout())

    def test_a_subset_is_limited_but_keeps_all_classes(self, tmp_path):
        share = own(write(tmp_path, ROWS), max_examples=3, holdout_fraction=0.0).share()

        assert share.label_names == ("a", "b", "c")
        assert share.num_examples == len(share.train()) == 3
        assert len(share.holdout()) == 0

    def test_other_columns_can_be_named(self, tmp_path):
        rows = [{"body": row["text"], "topic": row["label"], "label": "x"} for row in ROWS]
        path = write(tmp_path, rows)

        share = own(path, text_column="body", label_column="topic").share()

        assert share.label_names == ("a", "b", "c")

    def test_counting_does_not_tokenize_and_tokens_are_cached(self, tmp_path):
        path, tokenizer = write(tmp_path, ROWS), Tokenizer()

        share = own(path, tokenize=tokenizer, cache=tmp_path / "cache").share(CLASSES)
        assert (share.num_examples, tokenizer.asked) == (18, [])
        share.train()
        share.holdout()
        own(path, tokenize=tokenizer, cache=tmp_path / "cache").share(CLASSES).train()

        assert len(tokenizer.asked) == 1


class TestRefusals:
    def test_unknown_labels_are_named_to_the_node_alone(self, tmp_path):
        with pytest.raises(UnfitDataError) as caught:
            own(write(tmp_path, ROWS)).share(("a", "x"))

        assert str(caught.value) == (
            "dataset.label_names: labels of this node are not among the 2 of the run; its own log "
            "names them"
        )
        assert caught.value.details == "unknown: 'b', 'c'"

    @pytest.mark.parametrize("kind", ["text", "label"])
    def test_a_missing_column_is_named_to_the_node_alone(self, tmp_path, kind):
        with pytest.raises(UnfitDataError, match=f"file has no {kind} column") as caught:
            own(write(tmp_path, ROWS), **{f"{kind}_column": "absent"}).share()

        assert f"{kind}-column in its --node-config" in str(caught.value)
        assert "absent" not in str(caught.value)
        assert caught.value.details == "no column 'absent', it has 'text', 'label'"

    def test_too_many_labels_are_the_wrong_column(self, tmp_path):
        rows = [{"text": "t 1", "label": f"secret {i}"} for i in range(MOST_LABELS + 1)]

        with pytest.raises(UnfitDataError, match=r"does label-column .* name the label") as caught:
            own(write(tmp_path, rows)).share()

        assert "secret" not in str(caught.value)
        assert "secret" in caught.value.details

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "no rows"),
            (b"text,label\n", "no rows"),
            (b"text,label\nt 1,\n", "column 'label' is empty in row 1"),
            (b"text,label\n,a\n", "column 'text' is empty in row 1"),
        ],
    )
    def test_files_without_usable_rows(self, tmp_path, content, words):
        (tmp_path / "my.csv").write_bytes(content)

        with pytest.raises(DataError, match=words) as caught:
            own(tmp_path / "my.csv").share()

        assert not isinstance(caught.value, UnfitDataError)  # these may quote a path or a cell

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("my.parquet", b"no parquet", "cannot read"),
            ("my.jsonl", b"{", "not a JSON object"),
            ("my.xls", b"x", "no known format"),
        ],
    )
    def test_broken_files(self, tmp_path, name, content, words):
        (tmp_path / name).write_bytes(content)

        with pytest.raises(DataError, match=words):
            own(tmp_path / name).share()

    def test_a_missing_file_or_a_folder(self, tmp_path):
        write(tmp_path, ROWS)

        with pytest.raises(DataError, match=r"data-path: no file .*did you mean 'my\.jsonl'"):
            OwnFile(str(tmp_path / "mi.jsonl")).version()
        with pytest.raises(DataError, match="data-path: expected a file"):
            OwnFile(str(tmp_path)).version()

    def test_the_version_changes_with_the_file(self, tmp_path):
        file = OwnFile(str(write(tmp_path, ROWS)))
        before = file.version()

        write(tmp_path, ROWS[:-1])

        assert file.version() != before


class TestWhatMayLeave:
    """Names of classes leave only if they look like such; texts of a wrong column do not."""

    def refused(self, path, **settings):
        with pytest.raises(UnfitDataError, match=r"does label-column .* name the label") as caught:
            own(path, **settings).share()
        assert "secret" not in str(caught.value)
        assert "secret" in caught.value.details
        # Under the run's own classes nothing is asked out, so nothing is refused.
        with pytest.raises(UnfitDataError, match="are not among"):
            own(path, **settings).share(["other"])
        return str(caught.value)

    def rows(self, tmp_path, labels, times):
        return write(tmp_path, [{"text": "t 1", "label": name} for name in labels] * times)

    def test_more_classes_than_the_node_lets_out(self, tmp_path):
        path = self.rows(tmp_path, [f"secret {i}" for i in range(201)], times=3)

        assert "201 labels, max-labels lets 200 leave" in self.refused(path)
        assert len(own(path, max_labels=201).share().label_names) == 201

    def test_longer_ones(self, tmp_path):
        path = self.rows(tmp_path, ["secret " + "x" * 54, "z"], times=4)

        assert "a label of 61 characters, max-label-length is 60" in self.refused(path)
        assert len(own(path, max_label_length=61).share().label_names) == 2

    @pytest.mark.parametrize(("labels", "times", "rows"), [(9, 1, 9), (30, 1, 30), (45, 1, 45)])
    def test_labels_that_hardly_repeat(self, tmp_path, labels, times, rows):
        path = self.rows(tmp_path, [f"secret {i}" for i in range(labels)], times)

        assert f"{labels} labels in {rows} rows, expected 2 rows of each" in self.refused(path)

    def test_two_rows_of_each_are_enough(self, tmp_path):
        path = self.rows(tmp_path, ["a", "b", "c"], times=2)

        assert own(path).share().label_names == ("a", "b", "c")


class TestLabelNames:
    def test_the_union_is_sorted_whatever_the_order(self):
        assert union_of_labels([["b"], [], ["c", "b", "a"]]) == ("a", "b", "c")
        assert union_of_labels([["10"], ["9", "2"]]) == ("2", "9", "10")

    @pytest.mark.parametrize("lists", [[], [["a"], ["a"]]])
    def test_fewer_than_two_classes_are_refused(self, lists):
        with pytest.raises(DataError, match="expected at least 2"):
            union_of_labels(lists)

    def test_a_union_of_allowed_lists_may_be_too_large(self):
        lists = [[f"{half}/{i}" for i in range(MOST_LABELS // 2 + 1)] for half in "ab"]

        with pytest.raises(DataError, match=f"expected at most {MOST_LABELS}"):
            union_of_labels(lists)

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            ([f"{i}" for i in range(MOST_LABELS + 1)], "10001 label names"),
            (["a", "x" * (LONGEST_LABEL + 1)], "201 characters"),
            (["a", 3], "not text"),
            (["a", ["b"]], "not text"),
            (["a", " "], "blank"),
            (["a", "b\nERROR forged"], "control"),
            (["a", "\ud800"], "control"),
            (["a", "b", "a"], "repeated"),
        ],
    )
    def test_lists_that_nobody_should_send(self, names, words):
        fault = label_fault(names)

        assert words in fault
        assert "forged" not in fault

    @pytest.mark.parametrize("names", [[], ["x" * LONGEST_LABEL, "a b", "für\u00a0alle"]])
    def test_usual_names_pass(self, names):
        assert label_fault(names) == ""


class TestCentralFile:
    def central(self, label_names=CLASSES, **settings):
        source = DatasetSettings("on_device", **settings)
        return CentralFile(source, label_names, tokenize=Tokenizer(), tokenizer_key="k", cache=None)

    def test_without_a_file_neither_split_has_rows(self):
        central = self.central()

        assert len(central.test) == len(central.validation) == 0
        assert central_label_names(DatasetSettings("on_device")) == ()

    def test_a_test_file_is_read_under_the_runs_classes(self, tmp_path):
        path = write(tmp_path, ROWS)

        central = self.central(test_path=str(path))

        names = [CLASSES[label] for label in central.test.labels]
        assert names == [ROWS[number]["label"] for number in numbers(central.test)]
        assert (len(central.test), len(central.validation)) == (23, 0)
        assert central_label_names(DatasetSettings("on_device", test_path=str(path))) == (
            "a",
            "b",
            "c",
        )

    def test_its_size_can_be_limited(self, tmp_path):
        central = self.central(test_path=str(write(tmp_path, ROWS)), max_test_examples=6)

        assert len(np.unique(central.test.tokens)) == 6

    def test_labels_outside_of_the_runs_are_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"dataset\.test_path .* not among the 2 label names"):
            self.central(("a", "b"), test_path=str(write(tmp_path, ROWS)))

    def test_a_training_file_on_the_server_is_a_mistake(self, tmp_path):
        with pytest.raises(DataError, match=r"dataset\.path=.*data-path in its --node-config"):
            self.central(path=str(write(tmp_path, ROWS)))


class TestLabelNamesOfOtherSources:
    def test_the_setting_decides_the_order(self, tmp_path):
        path = write(tmp_path, ROWS)

        data = load_text(DatasetSettings("local", path=str(path), label_names=CLASSES))

        assert data.label_names == CLASSES
        assert {CLASSES[label] for label in data.train["label"][:]} == {"a", "b", "c"}

    def test_there_is_nothing_to_load_on_device(self):
        with pytest.raises(DataError, match="the data stay on the nodes"):
            load_text(DatasetSettings("on_device"))
