"""Records are read on from where the last look ended; what is damaged is named and left out."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from run_folders import client_record, log_round, round_record

from hafl_app.dashboard.folders import Root
from hafl_app.dashboard.records import Records, _fields
from hafl_app.tracking.jsonl import JsonlTracker


@pytest.fixture
def file(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.start({}, ())
    log_round(tracker, 0)
    log_round(tracker, 1)
    return tmp_path / "metrics.jsonl"


def read(file, records=None):
    records = records or Records()
    records.read_on(Root(file.parent), file)
    return records


def append(file, text):
    with file.open("a") as opened:
        opened.write(text)


def test_records_are_those_that_were_logged(file):
    records = read(file)
    assert records.rounds == [round_record(0), round_record(1)]
    assert records.clients == [client_record(1, client) for client in range(3)]
    assert not records.faults


def test_only_what_was_added_is_read_again(file):
    records = read(file)
    whole = file.read_text()
    # What was read before is not looked at again.
    file.write_text("x" * (len(whole) - 1) + "\n")
    append(file, json.dumps({"kind": "round", **vars(round_record(2))}) + "\n")
    assert [r.server_round for r in read(file, records).rounds] == [0, 1, 2]


def test_another_file_is_read_from_its_start(file):
    records = read(file)
    new = file.with_name("new")
    new.write_text(json.dumps({"kind": "round", **vars(round_record(7))}) + "\n")
    new.replace(file)
    assert [r.server_round for r in read(file, records).rounds] == [7]


def test_half_a_line_waits_for_its_rest(file):
    line = json.dumps({"kind": "round", **vars(round_record(2))}) + "\n"
    append(file, line[:30])
    records = read(file)
    assert len(records.rounds) == 2
    assert not records.faults
    append(file, line[30:])
    assert len(read(file, records).rounds) == 3


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        '"text"',
        "{}",
        '{"kind": "round"}',
        '{"kind": "round", "server_round": "1"}',
        json.dumps({"kind": "round", **vars(round_record(2, metrics=[1]))}),
        '{"kind": "importance", "server_round": 1, "measure": "m", "modules": [1]}',
        "[" * 100_000,
        "\xff\xfe",
    ],
    ids=lambda line: line[:30],
)
def test_a_damaged_line_is_named_and_the_others_count(file, line):
    append(file, line + "\n")
    append(file, json.dumps({"kind": "round", **vars(round_record(2))}) + "\n")
    records = read(file)
    assert [r.server_round for r in records.rounds] == [0, 1, 2]
    assert records.faults == ["metrics.jsonl, line 6: not a record, left out"]


def test_few_of_many_damaged_lines_are_named(file):
    append(file, "x\n" * 1000)
    assert len(read(file).faults) == 3


def test_a_newer_record_may_have_more_and_an_older_one_less(file):
    line = {"kind": "client", **vars(client_record(2, 0)), "from_the_future": 1}
    del line["steps"]
    append(file, json.dumps(line) + "\n" + '{"kind": "from the future"}\n')
    records = read(file)
    assert repr(records.clients[-1]) == repr(client_record(2, 0))  # NaN is not itself
    assert not records.faults


def test_a_field_that_is_not_shown_keeps_its_default(file):
    @dataclass
    class Newer:
        server_round: int
        shares: Sequence[bytes] = field(default_factory=list)

    assert [name for name, *_ in _fields(Newer)] == ["server_round"]


def test_what_is_no_number_is_nan(file):
    line = {"kind": "round", **vars(round_record(2))} | {"train_loss": None}
    line["metrics"] = {"a": "1", "b": None, "c": True, "d": 10**400, "e": 0.5}
    append(file, json.dumps(line) + "\n")
    record = read(file).rounds[-1]
    assert math.isnan(record.train_loss)
    assert [name for name, value in record.metrics.items() if math.isfinite(value)] == ["e"]
