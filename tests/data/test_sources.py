import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
import pytest

from hafl_app.data import hub
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.sources import DataError, load_text

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROWS = [{"text": f"text {i}", "label": "ab"[i % 3 == 0], "user": i % 4} for i in range(30)]


def real(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"no ../shared/data/{name} beside the checkout")
    return str(SHARED / name)


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows):
    return pd.DataFrame(rows).to_csv(index=False)


def local(path, **settings):
    return DatasetSettings("local", path=str(path), **settings)


def pairs(dataset, names):
    return Counter((row["text"], names[row["label"]]) for row in dataset)


EXPECTED = Counter((row["text"], row["label"]) for row in ROWS)


class TestLocal:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("train.csv", as_csv(ROWS).encode()),
            ("train.csv.gz", gzip.compress(as_csv(ROWS).encode())),
            ("train.tsv", pd.DataFrame(ROWS).to_csv(index=False, sep="\t").encode()),
            ("train.jsonl", as_jsonl(ROWS).encode()),
            ("train.jsonl.gz", gzip.compress(as_jsonl(ROWS).encode())),
            ("train.jsonl.xz", lzma.compress(as_jsonl(ROWS).encode())),
            ("train.json", json.dumps(ROWS, indent=1).encode()),
            ("train.json", as_jsonl(ROWS).encode()),
            ("train.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
            ("train.csv", b"\xef\xbb\xbf" + as_csv(ROWS).encode()),
            ("train.jsonl", b"\xef\xbb\xbf" + as_jsonl(ROWS).encode()),
        ],
    )
    def test_every_format_gives_the_same_rows(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        (tmp_path / "test.jsonl").write_text(as_jsonl(ROWS[:5]))

        data = load_text(local(tmp_path))

        assert data.label_names == ("a", "b")
        assert pairs(data.train, data.label_names) == EXPECTED
        assert len(data.test) == 5
        owners = {(row["text"], row["user"]) for row in data.train}
        assert owners == {(row["text"], row["user"]) for row in ROWS}

    def test_parquet(self, tmp_path):
        pd.DataFrame(ROWS).to_parquet(tmp_path / "my.parquet")

        data = load_text(local(tmp_path / "my.parquet"))

        together = datasets.concatenate_datasets([data.train, data.test])
        assert pairs(together, data.label_names) == EXPECTED

    @pytest.mark.parametrize("seed", range(4))
    def test_a_tenth_becomes_the_test_set_by_class(self, tmp_path, seed):
        rows = [{"text": f"t{i}", "label": "rare" if i < 20 else "common"} for i in range(100)]
        (tmp_path / "my.jsonl").write_text(as_jsonl(rows))

        data = load_text(local(tmp_path / "my.jsonl", data_seed=seed))

        # A tenth of 80 and of 20, by hand; the names are sorted.
        assert Counter(data.test["label"][:]) == {0: 8, 1: 2}
        assert set(data.train["text"][:]).isdisjoint(data.test["text"][:])
        assert len(data.train) == 90

    def test_test_path_goes_before_the_folders_test_file(self, tmp_path):
        for name, rows in (("train", ROWS), ("test", ROWS[:3]), ("other", ROWS[:7])):
            (tmp_path / f"{name}.jsonl").write_text(as_jsonl(rows))

        data = load_text(local(tmp_path, test_path=str(tmp_path / "other.jsonl")))

        assert len(data.test) == 7

    def test_integer_labels_are_sorted_by_value(self, tmp_path):
        rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([10, 9, 2, 10])]
        (tmp_path / "train.jsonl").write_text(as_jsonl(rows))
        (tmp_path / "test.csv").write_text("text,label\nu,9\n")

        data = load_text(local(tmp_path))

        assert data.label_names == ("2", "9", "10")
        assert data.test["label"][:] == [1]

    def test_words_that_pandas_takes_for_null_are_texts(self, tmp_path):
        (tmp_path / "train.csv").write_text("text,label\nNA,None\n01,nan\n")
        (tmp_path / "test.csv").write_text("text,label\nnull,None\n")

        data = load_text(local(tmp_path))

        assert data.label_names == ("None", "nan")
        assert sorted(data.train["text"][:]) == ["01", "NA"]

    def test_numbers_stay_as_they_are_written(self, tmp_path):
        (tmp_path / "train.csv").write_text("text,label\n01,007\n1.50,08\n")
        (tmp_path / "test.csv").write_text("text,label\n2,08\n2,007\n")

        data = load_text(local(tmp_path))

        assert data.label_names == ("007", "08")
        assert sorted(data.train["text"][:]) == ["01", "1.50"]

    def test_integers_that_became_floats_are_the_same_labels(self, tmp_path):
        pd.DataFrame({"text": ["x", "y"], "label": [1.0, 2.0]}).to_parquet(
            tmp_path / "train.parquet"
        )
        (tmp_path / "test.csv").write_text("text,label\nz,2\n")

        data = load_text(local(tmp_path))

        assert data.label_names == ("1", "2")
        assert data.test["label"][:] == [1]

    def test_train_goes_before_longer_names(self, tmp_path):
        (tmp_path / "train.jsonl").write_text(as_jsonl(ROWS))
        (tmp_path / "train_old.jsonl").write_text(as_jsonl(ROWS[:4]))
        (tmp_path / "my_test.jsonl").write_text(as_jsonl(ROWS[:5]))
        (tmp_path / "latest.jsonl").write_text(as_jsonl(ROWS[:6]))  # ends in "test"

        data = load_text(local(tmp_path))

        assert (len(data.train), len(data.test)) == (30, 5)

    def test_other_columns_become_text_and_label(self, tmp_path):
        rows = [{"q": f"q{i}", "kind": "xy"[i % 2], "label": 7} for i in range(4)]
        (tmp_path / "train.jsonl").write_text(as_jsonl(rows))
        (tmp_path / "test.jsonl").write_text(as_jsonl(rows[:1]))

        data = load_text(local(tmp_path, text_column="q", label_column="kind"))

        assert data.label_names == ("x", "y")
        assert all(data.label_names[row["label"]] == row["kind"] for row in data.train)
        assert all(row["text"] == row["q"] for row in data.train)

    def test_subset_is_random_seeded_and_nested(self, tmp_path):
        (tmp_path / "train.jsonl").write_text(as_jsonl(ROWS))
        (tmp_path / "test.jsonl").write_text(as_jsonl(ROWS))

        def texts(size, seed=0):
            data = load_text(
                local(tmp_path, max_examples=size, max_test_examples=4, data_seed=seed)
            )
            assert len(data.test) == 4
            assert data.label_names == ("a", "b")
            return data.train["text"][:]

        assert texts(10) == texts(10) == texts(20)[:10]
        assert texts(10) != texts(10, seed=1)
        assert texts(10) != [row["text"] for row in ROWS[:10]]
        assert len(texts(10**6)) == len(ROWS)


class TestMistakes:
    """Every message names the fault, its place, and the nearest right name."""

    @pytest.fixture
    def write(self, tmp_path):
        def write(name, content):
            (tmp_path / name).write_text(content)
            return tmp_path / name

        return write

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.csv", "", "a.csv has no rows"),
            ("a.csv", "text,label\n", "a.csv has no rows"),
            ("a.jsonl", "\n", "a.jsonl has no rows"),
            ("a.json", "[]", "a.json has no rows"),
            ("a.csv", "text,labels\nx,y\n", "no column 'label', only text, labels.*'labels'"),
            ("a.csv", "txt,label\nx,y\n", "dataset.text_column.*only txt, label.*mean 'txt'"),
            ("a.csv", "text,label\nx,y\nz,\n", "'label' is empty in row 2;"),
            ("a.csv", "text,label\nx,y\n,y\n,y\n", r"'text' is empty in row 2 \(and 1 more\)"),
            ("a.jsonl", '{"text": null, "label": 1}', "'text' is empty in row 1"),
            ("a.jsonl", '{"text": "x"}\n{"text": "x", "label": 1}', "'label' is empty in row 1"),
            ("a.jsonl", '{"text": " ", "label": 1}', "'text' is blank in row 1"),
            ("a.jsonl", '{"text": 5, "label": 1}', "'text' is not a string in row 1"),
            ("a.jsonl", '{"text": "x", "label": 1}\n{oops', "line 2: not a JSON object"),
            ("a.json", "[1, 2]", "expected a list of objects"),
            ("a.jsonl.gz", "not gzip", "cannot read .*a.jsonl.gz as jsonl"),
            ("a.parquet", "not parquet", "cannot read .*a.parquet as parquet"),
            ("a.csv", 'text,label\n"x,y\n', "a.csv, line 2: a double quote opens a field that is"),
            ("a.doc", "x", r"no known format; expected one of \.csv"),
            ("a.txt", "x", "a.txt, line 1: 0 tabs, expected one"),
            ("a.csv", "text,label\nx,y\n", "dataset.test_path: no test set"),
        ],
    )
    def test_file(self, write, name, content, expected):
        with pytest.raises(DataError, match=expected) as error:
            load_text(local(write(name, content)))
        assert "\n" not in str(error.value)

    def test_mixed_types_in_another_column(self, write):
        rows = [{"text": "x", "label": i % 2, "user": user} for i, user in enumerate("ab12")]
        rows = [row | {"user": int(row["user"])} if i > 1 else row for i, row in enumerate(rows)]

        with pytest.raises(DataError, match=r"mixes types.*user"):
            load_text(local(write("a.jsonl", as_jsonl(rows))))

    def test_file_that_is_not_there(self, write):
        write("train.csv", "text,label\nx,y\n")

        with pytest.raises(
            DataError, match=r"dataset.path: no file.*trian.csv'; did you mean 'train"
        ):
            load_text(local(write("x.csv", "").parent / "trian.csv"))

    def test_label_that_only_the_test_data_has(self, write):
        train = write("train.csv", "text,label\nx,refund\ny,card\n")
        test = write("test.csv", "text,label\nz,refnud\n")

        with pytest.raises(DataError, match=r"test data: 1 rows, the first is row 1, have a label"):
            load_text(local(train, test_path=str(test), max_test_examples=1))

    def test_folder_without_or_with_two_training_files(self, write, tmp_path):
        with pytest.raises(DataError, match="no train file"):
            load_text(local(tmp_path))
        write("my_train_a.csv", "")
        write("my_train_b.csv", "")
        with pytest.raises(DataError, match=r"several train files \(my_train_a.csv, my_train_b"):
            load_text(local(tmp_path))

    def test_source(self):
        with pytest.raises(DataError, match=r"'bankin77' is none of.*did you mean 'banking77'"):
            load_text(DatasetSettings("bankin77"))  # type: ignore[arg-type]

    def test_nothing_to_load(self):
        for source in ("local", "banking77", "newsgroups"):
            with pytest.raises(DataError, match=r"dataset\.path"):
                load_text(DatasetSettings(source))


class TestBanking77:
    def test_label_names_are_those_of_the_list(self, tmp_path):
        (tmp_path / "train.csv").write_text("text,category\nhow,b\nwhy,a\n")
        (tmp_path / "test.csv").write_text("text,category\nwhen,c\n")
        (tmp_path / "categories.json").write_text('["c", "b", "a"]')

        data = load_text(DatasetSettings("banking77", path=str(tmp_path), label_column="category"))

        assert data.label_names == ("a", "b", "c")
        assert data.test[0]["label"] == 2

    def test_original_release(self):
        path = real("banking77")

        data = load_text(DatasetSettings("banking77", path=path, label_column="category"))

        assert (len(data.train), len(data.test), len(data.label_names)) == (10003, 3080, 77)
        assert data.label_names == tuple(sorted(set(data.train["category"][:])))
        assert all(data.label_names[row["label"]] == row["category"] for row in data.test)


class TestNewsgroups:
    def test_subject_and_body_shuffled(self, tmp_path):
        posts = [
            {"id": i, "label": i // 20, "subject": f"Re: {i}", "text": f"body {i}" if i else ""}
            for i in range(40)
        ]
        for split in ("train", "test"):
            packed = gzip.compress(as_jsonl(posts).encode())
            (tmp_path / f"news_{split}_v1.jsonl.gz").write_bytes(packed)
        (tmp_path / "labels.json").write_text('["sci.med", "rec.autos"]')

        data = load_text(DatasetSettings("newsgroups", path=str(tmp_path)))

        assert data.label_names == ("sci.med", "rec.autos")
        assert {row["id"]: row["text"] for row in data.train} == {
            i: f"Re: {i}\nbody {i}" if i else "Re: 0\n" for i in range(40)
        }
        assert {row["id"]: row["label"] for row in data.train} == {i: i // 20 for i in range(40)}
        assert len(set(data.train["label"][:20])) == 2

    def test_original_files(self):
        path = real("20newsgroups")

        data = load_text(DatasetSettings("newsgroups", path=path, max_examples=2000))

        assert (len(data.train), len(data.test), len(data.label_names)) == (2000, 7532, 20)
        assert data.label_names == tuple(sorted(data.label_names))
        # 11,314 posts in 20 classes of 377 to 600: a subset of a sorted file would have 4 classes.
        assert min(Counter(data.train["label"][:]).values()) > 40


class TestHub:
    def splits(self, columns, features=None):
        return datasets.DatasetDict(
            {s: datasets.Dataset.from_dict(columns, features=features) for s in ("train", "test")}
        )

    def test_names_of_label_text(self, monkeypatch):
        asked = []

        def load(name, revision):
            asked.append((name, revision))
            return self.splits({"text": ["x", ""], "label": [1, 0], "label_text": ["b", "a"]})

        monkeypatch.setattr(hub.datasets, "load_dataset", load)

        data = load_text(DatasetSettings("newsgroups", hub="who/what", revision="abc"))

        assert asked == [("who/what", "abc")]
        assert pairs(data.test, data.label_names) == {("x", "b"): 1, ("", "a"): 1}

    def test_names_of_a_class_label(self, monkeypatch):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["q", "p"])}
        )
        splits = self.splits({"text": ["x", "y"], "label": [0, 1]}, features)
        monkeypatch.setattr(hub.datasets, "load_dataset", lambda *_, **__: splits)

        data = load_text(DatasetSettings("banking77", hub="who/what"))

        assert pairs(data.train, data.label_names) == {("x", "q"): 1, ("y", "p"): 1}

    def test_split_missing(self, monkeypatch):
        splits = self.splits({"text": ["x"], "label": [0]})
        del splits["test"]
        monkeypatch.setattr(hub.datasets, "load_dataset", lambda *_, **__: splits)

        with pytest.raises(DataError, match="'who/what' has no split test"):
            load_text(DatasetSettings("banking77", hub="who/what"))

    def test_offline_names_the_way_out(self, tmp_path):
        script = (
            "from hafl_app.data.settings import DatasetSettings\n"
            "from hafl_app.data.sources import DataError, load_text\n"
            "try: load_text(DatasetSettings('banking77', hub='mteb/banking77'))\n"
            "except DataError as error: print(error)"
        )
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}

        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True,
            check=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip

        assert run.stdout.count("\n") == 1
        assert "cannot load 'mteb/banking77'" in run.stdout
        assert "set dataset.path to a folder" in run.stdout


def test_local_files_are_loaded_without_writing(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text(as_csv(ROWS))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    load_text(local("data")).train.select([2, 1])

    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "train.csv"]


def test_synthetic():
    data = load_text(DatasetSettings("synthetic", num_train=60, num_test=40, max_examples=50))

    assert (len(data.train), len(data.test)) == (50, 40)
    assert set(data.test["label"][:]) == set(range(len(data.label_names)))
