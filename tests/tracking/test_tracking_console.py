import io
import math
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from hafl_app.tracking.as_text import (
    WIDTH,
    Printer,
    duration,
    fitted,
    megabytes,
    percent,
    points,
    short_duration,
    wrapped,
)
from hafl_app.tracking.base import ClientRow, History, RoundRecord
from hafl_app.tracking.closing import Clock, print_closing
from hafl_app.tracking.console import ConsoleTracker


class Log:
    """A tracker that prints into a text, as into a log."""

    def __init__(self, num_rounds=10, seconds_left=None, **console):
        self._file = io.StringIO()
        self.console = Console(file=self._file, **{"width": WIDTH, **console})
        self.tracker = ConsoleTracker(self.console, num_rounds, seconds_left=seconds_left)

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

        assert log.rows[0] == "3 clients, 1,645 examples, MB of a round"
        assert log.rows[1] == "client rank examples down up device"
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

        assert log.rows[0] == "21 clients, 1,085 examples, MB of a round"
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
        scores = "val 51.2% test 48.7% loss 0.7500 16.4 MB"
        assert log.rows == [
            "round 0/10 val 25.0% test 24.0% loss - 0 MB 2.0s untrained",
            f"round 1/10 {scores} 8.0s ETA 1m12s",
            f"round 2/10 {scores} 10s ETA 1m12s",
        ]

    def test_a_head_in_closed_form_is_there_before_training(self, log, untrained):
        log.tracker.start({"model": {"head": "closed_form"}}, [])
        log.tracker.log_round(untrained)
        assert log.rows[-1].endswith("2.0s head alone")

    def test_the_time_left_is_that_of_the_whole_run_where_it_is_known(self, round_record):
        left = iter([3723.0, None])
        log = Log(seconds_left=lambda: next(left))
        for number in (1, 2):
            log.tracker.log_round(round_record(server_round=number))

        assert log.rows[0].endswith("8.4s ETA 1h02m")
        assert log.rows[1].endswith("8.4s")

    def test_last_line_has_no_time_left(self, log, round_record):
        log.tracker.log_round(round_record(server_round=10))

        assert "ETA" not in log.text

    def test_missing_metrics_are_dashes(self, log, round_record):
        log.tracker.log_round(round_record(metrics={}))

        assert "val - loss" in log.rows[0]  # the test data are not scored in every round

    def test_counts_failures(self, log, round_record):
        log.tracker.log_round(round_record(replies=3, failures=2))

        assert log.rows[-1].endswith("2 of 5 clients failed")

    def test_failed_client_is_a_line_with_its_reason_that_goes_on_below(self, log, client_record):
        log.tracker.log_client(client_record())
        log.tracker.log_client(client_record(error="[CUDA] out of memory\ntried " + "x" * 150))

        first, *rest = log.text.splitlines()
        assert first.startswith("round 1: client 7 (node 9007199254740993, rank 4) failed: [CUDA]")
        assert all(line.startswith("  ") for line in rest)
        assert "".join(rest).count("x") == 150

    def test_counts_those_that_their_time_stopped(self, log, client_record, round_record):
        log.tracker.log_client(client_record(out_of_time=True))
        log.tracker.log_round(round_record())
        log.tracker.log_round(round_record(server_round=2))

        before, _ = log.text.split("round  2/10")
        assert "1 stopped by their time" in before
        assert log.text.count("stopped") == 1


class TestFinish:
    def test_tells_the_last_round_from_the_best(self, log, untrained, round_record):
        best = {"validation/accuracy": 0.7, "test/accuracy": 0.66, "test/macro-f1": 0.6}
        log.tracker.log_round(untrained)
        log.tracker.log_round(round_record(server_round=1, metrics=best))
        log.tracker.log_round(round_record(server_round=2))

        log.tracker.finish({})

        assert "last round 2 51.2% 48.7% 43.1%" in log.rows
        assert "best validation 1 70.0% 66.0% 60.0%" in log.rows

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

    def test_traffic_adds_up_as_it_is_shown(self, log):
        log.tracker.finish({"bytes": SENT})

        lines = log.rows[log.rows.index("Traffic") + 1 :]
        assert lines[0] == "messages MB down MB up"
        assert lines[2:7] == [
            "training, rank 4 3 1.501 0.301",
            "training, rank 16 1 2.000 1.000",
            "evaluation 4 3.501 0.000",
            "training alone 2 0.400 0.401",
            "together 10 7.402 1.702",
        ]

    @pytest.mark.parametrize("size", [1, 7_130, 712_345, 9_999_999, 123_456_789, 98_765_432_100])
    def test_traffic_adds_up_whatever_its_size(self, log, size):
        parts = {str(rank): traffic(size + 17 * rank, size // 3 + rank, 1) for rank in (2, 4, 8)}
        log.tracker.finish({"bytes": {"train": {"by_rank": parts}}})

        cells = [line.split()[-2:] for line in log.rows[log.rows.index("Traffic") + 3 :][:4]]
        *rows, total = [[float(cell.replace(",", "")) for cell in row] for row in cells]
        for column in (0, 1):
            assert sum(row[column] for row in rows) == pytest.approx(total[column], abs=1e-9)
            exact = sum(part[("bytes_down", "bytes_up")[column]] for part in parts.values()) / 1e6
            assert total[column] == pytest.approx(exact, rel=2e-3, abs=2e-3)

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
        assert any("val 51.2%  test 48.7%" in line for line in lines)
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
    assert short_duration(seconds) == expected.replace(" min", "m").replace(" ", "")


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


def traffic(down, up, exchanges):
    return {"bytes_down": down, "bytes_up": up, "exchanges": exchanges, "refused": 0}


SENT = {
    "train": {"by_rank": {"4": traffic(1_500_600, 300_600, 3), "16": traffic(2_000_000, 10**6, 1)}},
    "evaluate": {"by_rank": {"4": traffic(3_000_600, 200, 3), "16": traffic(500_000, 100, 1)}},
    "alone": {"by_rank": {"4": traffic(400_000, 400_600, 2)}},
    "unseen": {"by_rank": {}},
}
ALONE = {"alone": 0.5, "gain": 0.1, "clients_alone": 3, "alone_at_max_rank": 0.51}


class TestEightyColumns:
    """Whatever is printed, no terminal of 80 columns breaks a line of it."""

    HUGE = "an error of [red]many[/] words " * 30 + "x" * 300 + " \u6f22\u5b57" * 60

    @pytest.fixture(params=[{"width": WIDTH}, {"width": WIDTH, "force_terminal": True}])
    def log(self, request):
        return Log(num_rounds=1000, seconds_left=lambda: 86_400.0 * 3, **request.param)

    def widest(self, log):
        plain = re.sub(r"\x1b\[[0-9;]*m", "", log.text)
        return max(plain.splitlines(), key=cell_len)

    @pytest.mark.parametrize("many", [3, 30])
    @pytest.mark.parametrize("device", ["cpu", "NVIDIA H100 80GB HBM3, bf16, 79 GB free", HUGE])
    def test_the_clients(self, log, many, device):
        rows = [ClientRow(10_000 + i, i, 1024, 10**7, device, 10**10, 10**10) for i in range(many)]
        log.tracker.start({}, rows, History([round_of(999)]))

        assert cell_len(self.widest(log)) <= WIDTH, self.widest(log)

    @pytest.mark.parametrize("metrics", ["accuracy", "perplexity", "clients", "none"])
    @pytest.mark.parametrize("seconds", [0.1, 59.0, 3599.0, 86_000.0])
    @pytest.mark.parametrize("number", [0, 1, 999, 1000])
    def test_a_round(self, log, metrics, seconds, number, client_record):
        log.tracker.log_client(
            client_record(server_round=number, error=self.HUGE, out_of_time=True)
        )
        log.tracker.log_round(
            round_of(
                number,
                seconds=seconds,
                metrics={**METRICS[metrics], "privacy/epsilon": 123.456},
                bytes_down=123_456_789_012,
                failures=123,
            )
        )

        assert cell_len(self.widest(log)) <= WIDTH, self.widest(log)

    @pytest.mark.parametrize("metrics", ["accuracy", "perplexity", "clients", "none"])
    @pytest.mark.parametrize("scale", [1, 10**6])
    def test_the_end(self, log, metrics, scale, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("hafl_app.tracking.closing.hafl_command", lambda: "hafl")
        score = METRICS[metrics].get("test/perplexity", 0.5) * 1.0
        sent = {
            phase: {"by_rank": {r: {k: v * scale for k, v in t.items()} for r, t in p.items()}}
            for phase, p in ((phase, part["by_rank"]) for phase, part in SENT.items())
        }
        summary = {
            "status": "finished",
            "metric": "perplexity" if metrics == "perplexity" else "accuracy",
            "device_ranks": [{"rank": 8, "ranks": [2, 16, 128], "federated": score, **ALONE}],
            "bytes": sent,
            "best_validation": {
                "round": 1, "chosen_by": "macro-f1", "rows": 10**6, "largest_class": 0.125
            },
            "clients": {"seen": {}, "unseen": {"partitions": list(range(60))}},
            "generation": {"num_examples": 10**5, "rouge-l": 0.5, "exact-match": 0.5},
            "stages": dict.fromkeys(
                ("train", "evaluate", "score", "unseen", "alone", "finish"), 12_345.0
            ),
            "nodes": [{"rank": 2}, {"rank": 16}],
            "seconds": 86_400.0,
        }  # fmt: skip
        rounds = [round_of(number, metrics=METRICS[metrics]) for number in (0, 1, 1000)]
        folder = tmp_path / "outputs" / "2026-11-26" / "21-15-39-flexlora_change"

        print_closing(Printer(log.console), summary, rounds, Clock(1e5, 2e5), folder)

        assert cell_len(self.widest(log)) <= WIDTH, self.widest(log)

    def test_the_reason_of_a_failure(self, log):
        log.tracker.fail(self.HUGE)

        assert cell_len(self.widest(log)) <= WIDTH, self.widest(log)

    def test_a_short_line_is_left_as_it_is(self):
        assert wrapped("a  b") == ["a  b"]
        assert wrapped("") == []

    def test_parts_that_do_not_fit_go_below(self):
        lines = fitted([Text("a" * 40), Text("b" * 38), Text("c", style="red")])

        assert [line.plain for line in lines] == [f"{'a' * 40}  {'b' * 38}", "  c"]
        assert lines[1].style == "red"


PERPLEXITIES = {
    "validation/perplexity": 41.03,
    "test/perplexity": 39.834,
    "test/token-accuracy": 0.262,
}


METRICS = {
    "accuracy": {"validation/accuracy": 1.0, "test/accuracy": 1.0, "test/macro-f1": 1.0},
    "perplexity": {"validation/perplexity": 123_456.7, "test/perplexity": 123_456.7},
    "clients": {"clients/accuracy": 0.5, "clients/macro-f1": 0.5},
    "none": {},
}


def round_of(server_round, **changes):
    fields = {
        "seconds": 1.0, "train_loss": 12.5, "bytes_down": 10**8, "bytes_up": 10**8, "replies": 3,
        "failures": 0, "metrics": {},
    }  # fmt: skip
    return RoundRecord(server_round, **{**fields, **changes})


class TestPerplexity:
    def test_a_round_names_it(self, log, round_record):
        log.tracker.log_round(round_record(metrics=PERPLEXITIES))

        assert log.rows[0].startswith("round 1/10 ppl val 41.03 test 39.83 loss 0.7500")

    def test_the_best_round_has_the_lowest(self, log, round_record):
        for number, perplexity in ((1, 50.0), (2, 30.0), (3, 40.0)):
            metrics = {**PERPLEXITIES, "validation/perplexity": perplexity}
            log.tracker.log_round(round_record(server_round=number, metrics=metrics))
        log.tracker.finish({})

        assert "round validation ppl test ppl test token accuracy" in log.rows
        assert "last round 3 40.00 39.83 26.2%" in log.rows
        assert "best validation 2 30.00 39.83 26.2%" in log.rows

    def test_a_device_gains_what_it_is_lower_by(self, log):
        row = {"rank": 2, "federated": 30.5, "alone": 41.25, "gain": 10.75, "clients_alone": 1}
        log.tracker.finish({"metric": "perplexity", "device_ranks": [row]})

        assert "2 30.50 41.25 +10.75 1" in log.rows
        assert "by how much the perplexity is lower." in " ".join(log.rows)
