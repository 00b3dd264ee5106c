"""Labels that are no classes are refused, and those that are have one spelling."""

import json

import pandas as pd
import pytest

from hafl_app.data.errors import DataError, UnfitDataError
from hafl_app.data.label_rules import MOST_FRACTIONS, class_fault, normal_labels
from hafl_app.data.labels import union_of_labels
from hafl_app.data.own_file import OwnFile, OwnText
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.sources import load_text


def names_of(values, **options):
    return normal_labels(pd.Series(values, dtype=object), "f: column 'l'", **options)


def load(tmp_path, labels, test=None, **settings):
    """Load jsonl files of texts with these labels, the test file by default of the same."""
    for split, values in (("train", labels), ("test", labels if test is None else test)):
        rows = [{"text": f"{split} {i}", "label": label} for i, label in enumerate(values)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load_text(DatasetSettings("local", path=str(tmp_path), **settings))


class TestSpelling:
    @pytest.mark.parametrize(
        ("values", "names"),
        [
            (["a", "a ", "\ta", "b\u00a0"], ["a", "a", "a", "b"]),
            (["0", "0.0", "1.00", "1.5"], ["0", "0", "1", "1.5"]),
            ([0, 0.0, 1.0], ["0", "0", "1"]),
            ([True, False], ["True", "False"]),
            (["007", "08"], ["007", "08"]),
        ],
    )
    def test_is_one_for_each_class(self, values, names):
        assert names_of(values)[0].tolist() == names

    def test_changes_are_counted(self):
        assert names_of(["a", "a ", " b", "1.0"])[1] == [
            "f: column 'l': white space around the label is dropped in 2 rows",
            "f: column 'l': the '.0' of a whole number is dropped in 1 row",
        ]
        assert names_of(["a", "b"])[1] == []

    @pytest.mark.parametrize(
        "pair", [("a", "A"), ("a b", "a  b"), ("7", "007"), ("3.1", "3.10"), ("é", "e\u0301")]
    )
    def test_that_hardly_differs_is_refused_unless_listed(self, pair):
        with pytest.raises(DataError, match="look like one class; write them alike, or list both"):
            names_of([*pair, "other"])
        assert names_of(pair, listed=pair)[0].tolist() == list(pair)

    def test_of_a_test_set_may_be_another_way_of_writing_numbers(self, tmp_path):
        data = load(tmp_path, [1.0, 2.0, 1.0], [1, 2, 2])

        assert data.label_names == ("1", "2")
        assert data.test["label"][:].count(1) == 2

    def test_of_a_test_set_in_another_case_is_refused_with_a_hint(self, tmp_path):
        with pytest.raises(DataError, match=r"not among the 2 .*only in how it is written"):
            load(tmp_path, ["a", "b"], ["A", "b"])

    def test_of_the_settings_is_brought_to_the_same(self, tmp_path):
        data = load(tmp_path, ["1.0", "0"], label_names=("0.0", "1.0"))

        assert data.label_names == ("0.0", "1.0")
        assert set(data.train["label"][:]) == {0, 1}

    def test_notes_are_kept_with_the_data(self, tmp_path):
        assert any("white space" in note for note in load(tmp_path, ["a ", "b"]).notes)


class TestKinds:
    @pytest.mark.parametrize(
        ("values", "match"),
        [
            (["a", 1], "mixes types: text in row 1, number in row 2"),
            ([1, 2, True], "mixes types: number in row 1, truth value in row 3"),
            ([1, ["a"]], "type list in row 2"),
            ([{"a": 1}], "type object in row 1"),
            ([b"a"], "type bytes in row 1"),
            ([float("inf"), 1], "type infinite number in row 1"),
            (["a", " "], "is blank in row 2"),
        ],
    )
    def test_that_are_no_classes_are_refused(self, values, match):
        with pytest.raises(DataError, match=match):
            names_of(values)


class TestClasses:
    def test_measurements_are_refused(self, tmp_path):
        with pytest.raises(
            DataError, match=r"dataset\.label_column: 30 different numbers with frac"
        ):
            load(tmp_path, [i / 7 for i in range(30)] * 2)
        assert len(load(tmp_path, [i / 2 for i in range(10)] * 2).label_names) == 10

    def test_fractions_are_classes_up_to_a_limit(self):
        labels = [str(i / 8) for i in range(1, MOST_FRACTIONS + 2)]
        assert class_fault(pd.Series(labels[:-1] * 3)) == ""
        assert "different numbers" in class_fault(pd.Series(labels * 3))

    def test_labels_that_hardly_repeat_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="60 different labels in 60 rows"):
            load(tmp_path, [f"id{i}" for i in range(60)])

    def test_one_class_of_all_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="all 5 training rows are of one class"):
            load(tmp_path, ["a"] * 5)
        with pytest.raises(DataError, match="all 5 training rows are of one class"):
            load(tmp_path, ["a"] * 5, label_names=("a", "b"))

    @pytest.mark.parametrize("names", [("a", "b", "a"), ("a", "b", "a "), ("a", "b", "")])
    def test_names_listed_twice_or_blank_are_refused(self, tmp_path, names):
        with pytest.raises(DataError, match=r"dataset\.label_names: .*(repeated|blank)"):
            load(tmp_path, ["a", "b"], label_names=names)

    def test_text_and_label_of_one_column_are_refused(self, tmp_path):
        with pytest.raises(
            DataError, match=r"text_column and dataset\.label_column are both 'label"
        ):
            load(tmp_path, ["a", "b"], text_column="label")

    def test_half_a_surrogate_pair_is_refused(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "\\ud800", "label": 1}\n')
        with pytest.raises(DataError, match="'text' has half a surrogate pair in row 1"):
            load_text(DatasetSettings("local", path=str(tmp_path / "a.jsonl")))

    def test_numbers_of_more_than_64_bits_are_refused(self, tmp_path):
        row = '{"text": "x", "label": %d, "id": 99999999999999999999999}\n'
        (tmp_path / "a.jsonl").write_text("".join(row % (i % 2) for i in range(9)))
        with pytest.raises(DataError, match="more than 64 bits"):
            load_text(DatasetSettings("local", path=str(tmp_path / "a.jsonl")))


class TestNodes:
    def own(self, tmp_path, labels):
        rows = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
        (tmp_path / "my.csv").write_text(f"text,label\n{rows}")
        return OwnText(
            OwnFile(str(tmp_path / "my.csv")),
            holdout_fraction=0.0, seed=1, tokenize=lambda texts: [[1] for _ in texts],
            tokenizer_key="k", cache=None,
        )  # fmt: skip

    def test_with_one_class_are_welcome(self, tmp_path):
        share = self.own(tmp_path, ["b "] * 5).share(("a", "b"))
        assert share.train().labels.tolist() == [1] * 5

    def test_whose_labels_are_measurements_do_not_fit(self, tmp_path):
        with pytest.raises(UnfitDataError, match="different numbers with fractions"):
            self.own(tmp_path, [i / 7 for i in range(40)]).share()

    def test_run_names_are_brought_to_the_same_spelling(self, tmp_path):
        share = self.own(tmp_path, ["1", "0"]).share(("0.0", "1.0"))
        assert sorted(share.train().labels.tolist()) == [0, 1]

    def test_that_write_a_class_otherwise_are_reported(self, caplog):
        assert union_of_labels([("a", "b"), ("A",)]) == ("A", "a", "b")
        assert "labels 'A' and 'a' of different nodes look like one class" in caplog.text
