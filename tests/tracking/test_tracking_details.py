"""Details of a run: what is written, and what of it a resumed run keeps."""

import json
import math

import pytest

from hafl_app.tracking.details import (
    DETAILS_FILE,
    DetailsFile,
    importance_record,
    score_record,
)


@pytest.fixture
def details(tmp_path):
    return DetailsFile(tmp_path)


def lines_of(folder):
    return [json.loads(line) for line in (folder / DETAILS_FILE).read_text().splitlines()]


def importance(server_round):
    return importance_record(server_round, "norm", {"layer.0": [1.0]})


def test_numbers_that_are_none_are_null_and_importance_has_four_digits(details, tmp_path):
    scores = {"accuracy": 1 / 3, "loss": math.nan}
    details.write([score_record(2, 5, 4, 30, scores)])
    details.write([importance_record(2, "smoothed", {"layer.0": [0.123456, math.nan]})])
    scored, measured = lines_of(tmp_path)
    assert scored["metrics"] == {"accuracy": 1 / 3, "loss": None}
    assert (scored["server_round"], scored["partition_id"], scored["rank"]) == (2, 5, 4)
    assert measured["modules"] == {"layer.0": [0.1235, None]}


def test_a_resumed_run_keeps_the_rounds_before(details, tmp_path):
    for server_round in (1, 2, 3):
        details.write([importance(server_round)])
    with (tmp_path / DETAILS_FILE).open("a") as file:
        file.write('{"kind": "importance", "server_rou')  # killed while it wrote
    details.start(2)
    assert [line["server_round"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_new_run_keeps_none(details, tmp_path):
    details.write([importance(1)])
    details.start(-1)
    details.write([importance(1)])
    assert len(lines_of(tmp_path)) == 1


def test_a_run_without_details_has_no_file(details, tmp_path):
    details.start(-1)
    details.write([])
    assert list(tmp_path.iterdir()) == []
