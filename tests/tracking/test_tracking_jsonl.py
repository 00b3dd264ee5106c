import json
import math
from pathlib import Path

import numpy as np
import pytest

from hafl_app.tracking.jsonl import JsonlTracker, read_history


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "outputs" / "run"


@pytest.fixture
def tracker(folder, client_rows):
    tracker = JsonlTracker(folder)
    tracker.start({}, client_rows)
    return tracker


def without_clock(record):
    return {k: v for k, v in vars(record).items() if k not in ("flops", "simulated_seconds")}


class TestLines:
    def test_parse_back_to_the_records(self, tracker, folder, round_record, client_record):
        failed = client_record(partition_id=8, error='out of memory: "8"\nsecond line')

        tracker.log_client(client_record())
        tracker.log_client(failed)
        tracker.log_round(round_record())

        assert read_lines(folder) == [
            {"kind": "client", **without_clock(client_record())},
            {"kind": "client", **without_clock(failed)},
            {"kind": "round", **without_clock(round_record())},
        ]

    def test_have_the_time_of_a_clock_if_there_is_one(self, tracker, folder, client_record):
        tracker.log_client(client_record(flops=2e9, simulated_seconds=3.5))

        (read,) = read_history(folder, 9).clients
        assert (read.flops, read.simulated_seconds) == (2e9, 3.5)

    @pytest.mark.parametrize(
        "error", ["a\u2028b\x85c", "\x1b[2J\x0b\x1c", "\ud800", 'x"}\n{"kind": "round"']
    )
    def test_no_text_breaks_a_line(self, tracker, folder, client_record, error):
        tracker.log_client(client_record(error=error))

        (read,) = read_history(folder, 9).clients
        assert read.error == error

    def test_are_on_disk_before_the_run_ends(self, tracker, folder, round_record):
        for count in (1, 2):
            tracker.log_round(round_record(server_round=count))
            assert len(read_lines(folder)) == count

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_json_lacks_is_null(self, tracker, folder, round_record, value):
        tracker.log_round(round_record(train_loss=value, metrics={"test/loss": value}))

        (line,) = read_lines(folder)
        assert line["train_loss"] is None
        assert line["metrics"] == {"test/loss": None}

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_full_disk_raises(self, folder, round_record):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").symlink_to("/dev/full")
        tracker = JsonlTracker(folder)
        tracker.start({}, [])

        with pytest.raises(OSError, match="No space left"):
            tracker.log_round(round_record())

    def test_outside_a_run_are_refused(self, tracker, folder, round_record):
        tracker.finish({})

        with pytest.raises(RuntimeError, match="before start or after the end"):
            tracker.log_round(round_record())

    def test_of_an_earlier_run_go(self, tracker, folder, client_rows, round_record):
        tracker.log_round(round_record(server_round=5))
        tracker.finish({})

        JsonlTracker(folder).start({}, client_rows)

        assert read_lines(folder) == []
        assert not (folder / "summary.json").exists()


class TestSummary:
    def test_is_sorted_indented_and_plain(self, tracker, folder):
        tracker.finish(
            {
                "test/accuracy": np.float32(0.5),
                "bytes": np.int64(7),
                "loss": math.nan,
                "device_ranks": [{"rank": 2, "gain": -math.inf}],
                "folder": Path("a/b"),
                "flag": True,
            }
        )

        text = (folder / "summary.json").read_text()
        assert json.loads(text) == {
            "bytes": 7,
            "device_ranks": [{"gain": None, "rank": 2}],
            "flag": True,
            "folder": "a/b",
            "loss": None,
            "status": "finished",
            "test/accuracy": 0.5,
        }
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"

    def test_failure_says_why(self, tracker, folder):
        tracker.fail("no client replied in round 3")

        expected = {"status": "failed", "reason": "no client replied in round 3"}
        assert read_summary(folder) == expected

    def test_failure_before_the_start_is_written_too(self, folder):
        JsonlTracker(folder).fail("too few clients")

        assert read_summary(folder)["status"] == "failed"

    def test_interrupted_writing_leaves_the_earlier_one(self, tracker, folder, monkeypatch):
        tracker.fail("first")
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk gone")))

        with pytest.raises(OSError, match="disk gone"):
            tracker.finish({})

        assert read_summary(folder)["reason"] == "first"
        assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "summary.json"]
