import io
import math
import re

import pytest
from rich.console import Console

from hafl_app.tracking.base import ClientRow
from hafl_app.tracking.console import (
    LOG_WIDTH,
    ConsoleTracker,
    duration,
    megabytes,
    percent,
    points,
)


class Log:
    """A tracker that prints into a text, as into a log."""

    def __init__(self, num_rounds=10, **console):
        self._file = io.StringIO()
        settings = {"width": LOG_WIDTH, **console}
        self.tracker = ConsoleTracker(Console(file=self._file, **settings), num_rounds)

    @property
    def text(self):
        return self._file.getvalue()

    @property
    def rows(self):
        """Lines with their runs of spaces made one."""
        return [" ".join(line.split()) for line in self.text.splitlines() if line.strip()]


@pytest.fixture
def log():
    return Log()


class TestStart:
    def test_lists_few_clients_one_by_one(self, log, client_rows):
        log.tracker.start({}, client_rows)

        assert log.rows[0] == "3 clients, 1,645 examples"
        assert log.rows[1] == "client rank examples down a round up a round device"
        assert log.rows[3:] == [
            "0 2 1,200 0.400 MB 0.100 MB cpu",
            "1 4 35 0.400 MB 0.200 MB cuda:0",
            "2 16 410 1.60 MB 1.60 MB cuda:1",
        ]

    def test_groups_many_clients_by_rank(self, log):
        # 14 of rank 2 with 10, 20, ..., 140 examples: median 75. 7 of rank 8 with 5 each.
        small = [ClientRow(i, i, 2, 10 * (i + 1), "cpu", 30_000, 10_000) for i in range(14)]
        large = [ClientRow(i, i, 8, 5, "cpu", 30_000, 20_000) for i in range(14, 21)]

        log.tracker.start({}, [*large, *small])

        assert log.rows[0] == "21 clients, 1,085 examples"
        assert log.rows[3:] == [
            "2 14 10 75 140 0.030 MB 0.010 MB",
            "8 7 5 5 5 0.030 MB 0.020 MB",
        ]


class TestRound:
    def test_line_has_every_number(self, log, untrained, round_record):
        log.tracker.log_round(untrained)
        log.tracker.log_round(round_record(server_round=1, seconds=8.0))
        log.tracker.log_round(round_record(server_round=2, seconds=10.0))

        # Time left: 8 more rounds at the mean of 8 s and 10 s; round 0 does not count.
        scores = "val 51.2% test 48.7% loss 0.7500 down 12.3 MB up 4.10 MB"
        assert log.rows == [
            "round 0/10 val 25.0% test 24.0% loss - down 0 MB up 0 MB 2.0 s untrained",
            f"round 1/10 {scores} 8.0 s ETA 1 min 12 s",
            f"round 2/10 {scores} 10 s ETA 1 min 12 s",
        ]

    def test_a_head_in_closed_form_is_there_before_training(self, log, untrained):
        log.tracker.start({"model": {"head": "closed_form"}}, [])
        log.tracker.log_round(untrained)
        assert log.rows[-1].endswith("2.0 s head alone")

    def test_last_line_has_no_time_left(self, log, round_record):
        log.tracker.log_round(round_record(server_round=10))

        assert "ETA" not in log.text

    def test_missing_metrics_are_dashes(self, log, round_record):
        log.tracker.log_round(round_record(metrics={}))

        assert "val - loss" in log.rows[0]  # the test data are not scored in every round

    def test_counts_failures(self, log, round_record):
        log.tracker.log_round(round_record(replies=3, failures=2))

        assert log.rows[0].endswith("2 of 5 clients failed")

    def test_failed_client_is_one_line_with_its_reason(self, log, client_record):
        log.tracker.log_client(client_record())
        log.tracker.log_client(client_record(error="[CUDA] out of memory\ntried " + "x" * 150))

        (line,) = log.text.splitlines()
        assert "client 7 (node 9007199254740993, rank 4) failed: [CUDA] out of memory" in line
        assert line.endswith("x" * 150)


class TestFinish:
    def test_tells_the_last_round_from_the_best(self, log, untrained, round_record):
        best = {"validation/accuracy": 0.7, "test/accuracy": 0.66, "test/macro-f1": 0.6}
        log.tracker.log_round(untrained)
        log.tracker.log_round(round_record(server_round=1, metrics=best))
        log.tracker.log_round(round_record(server_round=2))

        log.tracker.finish({})

        assert "last round 2 51.2% 48.7% 43.1%" in log.rows
        assert "best validation 1 70.0% 66.0% 60.0%" in log.rows
        # 2.0 + 8.4 + 8.4 s; 2 x 12.34 MB and 2 x 4.1 MB.
        assert log.rows[-1] == "2 rounds in 19 s, 24.7 MB down and 8.20 MB up."

    def test_scores_that_came_after_a_rounds_record_are_the_summarys(self, log, round_record):
        for number, accuracy in ((1, 0.7), (2, 0.6)):
            metrics = {"validation/accuracy": accuracy}
            log.tracker.log_round(round_record(server_round=number, metrics=metrics))

        best = {"round": 1, "test/accuracy": 0.66, "test/macro-f1": 0.6}
        final = {"test/accuracy": 0.5, "test/macro-f1": 0.4}
        log.tracker.finish({"best_validation": best, "final": final})

        assert "last round 2 60.0% 50.0% 40.0%" in log.rows
        assert "best validation 1 70.0% 66.0% 60.0%" in log.rows

    def test_without_validation_there_is_no_best(self, log, round_record):
        metrics = {"test/accuracy": 0.5, "validation/accuracy": math.nan}
        log.tracker.log_round(round_record(metrics=metrics))

        log.tracker.finish({})

        assert "last round 1 - 50.0% -" in log.rows
        assert "best validation" not in log.text

    def test_traffic_is_by_rank(self, log, client_record):
        for rank, down, up, error in [
            (4, 300_000, 100_000, ""),
            (4, 500_000, 200_000, ""),
            (4, 700_000, 0, "died"),  # in the totals, not in what a training costs
            (16, 2_000_000, 1_000_000, ""),
        ]:
            record = client_record(rank=rank, bytes_down=down, bytes_up=up, error=error)
            log.tracker.log_client(record)

        log.tracker.finish({})

        assert "4 3 0.400 MB 0.150 MB 1.50 MB 0.300 MB" in log.rows
        assert "16 1 2.00 MB 1.00 MB 2.00 MB 1.00 MB" in log.rows

    def test_device_table_has_a_signed_gain_a_rank(self, log):
        devices = [
            {"rank": 2, "federated": 0.5, "alone": 0.521, "gain": -0.021, "clients_alone": 3},
            {"rank": 16, "federated": 0.8, "alone": 0.7, "gain": 0.1, "clients_alone": 1},
        ]

        log.tracker.finish({"device_ranks": devices})

        assert "What each device gains" in log.rows
        assert "2 50.0% 52.1% -2.1 3" in log.rows
        assert "16 80.0% 70.0% +10.0 1" in log.rows

    def test_without_device_ranks_there_is_no_device_table(self, log, round_record):
        log.tracker.log_round(round_record())
        log.tracker.finish({"device_ranks": []})

        assert "What each device gains" not in log.text


class TestWhereItIsPrinted:
    def tell(self, tracker, client_rows, round_record, client_record):
        tracker.start({}, client_rows)
        tracker.log_client(client_record(error="died"))
        tracker.log_round(round_record(failures=1))
        gains = [{"rank": 2, "federated": 0.6, "alone": 0.5, "gain": 0.1, "clients_alone": 3}]
        tracker.finish({"device_ranks": gains})
        tracker.fail("stopped")

    def test_log_is_ascii_without_colors(self, log, client_rows, round_record, client_record):
        self.tell(log.tracker, client_rows, round_record, client_record)

        assert "The run failed: stopped" in log.text
        assert "\x1b" not in log.text
        assert log.text.isascii()

    def test_terminal_shows_failures_in_red_and_gains_in_green(
        self, client_rows, round_record, client_record
    ):
        log = Log(force_terminal=True, color_system="standard")

        self.tell(log.tracker, client_rows, round_record, client_record)

        red = re.findall(r"\x1b\[31m(.*?)\x1b", log.text)
        green = re.findall(r"\x1b\[32m(.*?)\x1b", log.text)
        assert len(red) == 3
        assert "1 of 4 clients failed" in red[1]
        assert green == ["+10.0"]

    def test_without_a_console_a_log_gets_its_width(self, capsys, monkeypatch, round_record):
        monkeypatch.setenv("COLUMNS", "20")
        tracker = ConsoleTracker(None, 10)

        tracker.log_round(round_record())
        tracker.finish({})

        lines = capsys.readouterr().out.splitlines()
        assert any("val  51.2%  test  48.7%" in line for line in lines)
        assert "last round 1 51.2% 48.7% 43.1%" in [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 MB"),
        (12, "<0.001 MB"),
        (1_500, "0.002 MB"),
        (123_400, "0.123 MB"),
        (4_100_000, "4.10 MB"),
        (12_340_000, "12.3 MB"),
        (123_400_000, "123 MB"),
        (12_345_678_900, "12,346 MB"),
    ],
)
def test_megabytes_have_sensible_digits(count, expected):
    assert megabytes(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (65, "1 min 05 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration_has_two_units_at_most(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.7125, "71.2%"), (1.0, "100.0%"), (None, "-"), (math.nan, "-")]
)
def test_percent_has_one_decimal(value, expected):
    assert percent(value) == expected


@pytest.mark.parametrize(
    ("value", "expected", "style"),
    [
        (0.0342, "+3.4", "green"),
        (-0.12, "-12.0", "red"),
        (-0.0001, "0.0", ""),
        (None, "-", ""),
        (math.nan, "-", ""),
    ],
)
def test_points_are_signed_and_colored(value, expected, style):
    assert (points(value).plain, str(points(value).style)) == (expected, style)


PERPLEXITIES = {
    "validation/perplexity": 41.03,
    "test/perplexity": 39.834,
    "test/token-accuracy": 0.262,
}


class TestPerplexity:
    def test_a_round_names_it(self, log, round_record):
        log.tracker.log_round(round_record(metrics=PERPLEXITIES))

        assert log.rows[0].startswith("round 1/10 val ppl 41.03 test ppl 39.83 loss 0.7500")

    def test_the_best_round_has_the_lowest(self, log, round_record):
        for number, perplexity in ((1, 50.0), (2, 30.0), (3, 40.0)):
            metrics = {**PERPLEXITIES, "validation/perplexity": perplexity}
            log.tracker.log_round(round_record(server_round=number, metrics=metrics))
        log.tracker.finish({})

        assert "round validation perplexity test perplexity test token accuracy" in log.rows
        assert "last round 3 40.00 39.83 26.2%" in log.rows
        assert "best validation 2 30.00 39.83 26.2%" in log.rows

    def test_a_device_gains_what_it_is_lower_by(self, log):
        row = {"rank": 2, "federated": 30.5, "alone": 41.25, "gain": 10.75, "clients_alone": 1}
        log.tracker.finish({"metric": "perplexity", "device_ranks": [row]})

        assert "2 30.50 41.25 +10.75 1" in log.rows
        assert "by how much the perplexity is lower." in log.text
