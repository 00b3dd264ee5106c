"""Settings of the data that cannot go together are refused before a file is read."""

import pytest

from hafl_app.data.combinations import check_choices
from hafl_app.data.errors import DataError
from hafl_app.data.federated import FederatedText
from hafl_app.data.partition import Partitioning
from hafl_app.data.settings import DatasetSettings, PartitionSettings
from hafl_app.data.sources import load_text

ASKED = {"answer_column": "output", "template": "{instruction}\n", "label_column": ""}


def source(name="local", **changes):
    return DatasetSettings(name, **{"path": "/absent/file.csv", **changes})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (ASKED | {"template": "{instruction}\n{output}"}, "names {output}, the answer column"),
        (ASKED | {"template": "no column"}, "names no column"),
        (ASKED | {"label_column": "output"}, "dataset.label_column=output is the answer column"),
        ({"template": "{text}"}, "no dataset.answer_column to learn"),
        ({"label_column": ""}, "dataset.label_column is empty"),
        ({"text_column": "label"}, "are both 'label'"),
        ({"name": "banking77", "test_path": "x.csv"}, "dataset.test_path='x.csv'"),
        ({"name": "synthetic"}, "dataset.path='/absent/file.csv'"),
        ({"name": "digits"}, "dataset.path='/absent/file.csv'"),
    ],
)
def test_are_refused(changes, match):
    # The file is not there: whoever looked for it first would say so.
    with pytest.raises(DataError, match=match) as caught:
        load_text(source(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [ASKED, ASKED | {"label_column": "kind"}, {}])
def test_that_go_together_are_let_through(changes):
    check_choices(source(**changes))


def federated(where, kind):
    return FederatedText(
        where, Partitioning(PartitionSettings(kind, classes_per_partition=2), 3, 0),
        tokenizer_key="k", cache=None,
        tokenize=lambda texts: [[1] for _ in texts],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
class TestSharingByClass:
    def test_needs_categories(self, kind):
        with pytest.raises(DataError, match=f"partition.kind={kind} .*dataset.label_column is emp"):
            federated(source(**ASKED), kind)
        federated(source(**ASKED | {"label_column": "kind"}), kind)
        federated(source(**ASKED), "iid")

    def test_needs_more_than_one_of_them(self, kind, tmp_path):
        rows = "".join(f"say {i},word,all\n" for i in range(40))
        (tmp_path / "train.csv").write_text(f"instruction,output,kind\n{rows}")
        where = source(**ASKED | {"label_column": "kind", "path": str(tmp_path)})

        with pytest.raises(DataError, match=r"but all \d+ rows are of one"):
            federated(where, kind).sizes()
        assert len(federated(where, "iid").sizes()) == 3
