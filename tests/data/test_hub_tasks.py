"""Natural Instructions from the hub: the load is played, nothing is downloaded."""

from dataclasses import replace

import datasets
import pandas as pd
import pytest

from hafl_app.data import hub_tasks
from hafl_app.data.errors import DataError
from hafl_app.data.hub_tasks import read_hub_tasks
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.sources import load_text

SOURCE = DatasetSettings(
    "natural_instructions",
    hub="who/tasks",
    revision="abc",
    template="{definition}\n\n{input}\n\n",
    answer_column="output",
    label_column="task",
)


def rows(number: int) -> datasets.Dataset:
    """Return rows of three tasks, with the columns of the hub's copy."""
    return datasets.Dataset.from_pandas(
        pd.DataFrame(
            {
                "task_name": [f"task{i % 3}" for i in range(number)],
                "id": [f"id-{i}" for i in range(number)],
                "definition": [f"do {i % 3}" for i in range(number)],
                "inputs": [f"in {i}" for i in range(number)],
                "targets": [f"out {i}" for i in range(number)],
            }
        )
    )


@pytest.fixture
def hub(monkeypatch):
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return rows(90)

    monkeypatch.setattr(hub_tasks.datasets, "load_dataset", load)
    return asked


def test_rows_become_prompts_and_answers_by_task(hub):
    text = load_text(SOURCE)

    assert hub == [("who/tasks", {"revision": "abc", "split": "train"})]
    assert text.label_names == ("task0", "task1", "task2")
    assert (len(text.train), len(text.test)) == (81, 9)
    for split in (text.train, text.test):
        for row in split:
            number = int(row["answer"].removeprefix("out "))
            assert row["text"] == f"do {number % 3}\n\nin {number}\n\n"
            assert row["label"] == number % 3
            assert row["task"] == f"task{number % 3}"


def test_a_subset_is_drawn_before_it_is_read(hub, monkeypatch):
    sizes = []
    whole = datasets.Dataset.to_pandas
    monkeypatch.setattr(
        datasets.Dataset, "to_pandas", lambda self: sizes.append(len(self)) or whole(self)
    )

    table = read_hub_tasks("who/tasks", None, most=20, seed=3)

    assert sizes == [20]
    again = read_hub_tasks("who/tasks", None, most=20, seed=3)
    other = read_hub_tasks("who/tasks", None, most=20, seed=4)
    assert table["output"].tolist() == again["output"].tolist() != other["output"].tolist()
    assert set(table["task"]) == {"task0", "task1", "task2"}  # not the first rows, task by task


def test_as_many_training_rows_as_were_asked_for_are_left(hub):
    assert len(load_text(replace(SOURCE, max_examples=27)).train) == 27


def test_other_columns_are_refused(monkeypatch):
    odd = rows(6).rename_column("targets", "answers")
    monkeypatch.setattr(hub_tasks.datasets, "load_dataset", lambda *_, **__: odd)
    with pytest.raises(DataError, match="who/tasks has no column 'targets'"):
        read_hub_tasks("who/tasks", None)


def test_no_network_is_told_in_one_line(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(hub_tasks.datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"cannot load 'who/tasks'.*dataset\.path") as caught:
        load_text(SOURCE)
    assert "\n" not in str(caught.value)


def test_a_folder_goes_before_the_hub(hub, tmp_path):
    with pytest.raises(DataError, match="no tasks of Natural Instructions"):
        load_text(replace(SOURCE, path=str(tmp_path)))
    assert hub == []
