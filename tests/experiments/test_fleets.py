"""Simulated devices of a comparison, and their time in its table."""

import json
import math

import pytest

from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments.fleets import check_fleets, fleet_line
from hafl_app.experiments.results import make_row
from hafl_app.experiments.table import Provenance, markdown
from hafl_app.reports.curve import Curve, read_curve
from hafl_app.reports.statistics import Spread


def jobs(*overrides):
    """Return the runs of a method for mixed ranks and of one at a single rank."""
    mixed = compose(["devices=mixed", *overrides])
    same = compose(["devices=mixed", "ranks=homogeneous", *overrides])
    return {("", "hafl", 0): mixed, ("", "fedit", 0): same}


class TestTheFleet:
    def test_by_rank_differs_between_methods_of_other_ranks(self):
        with pytest.raises(
            SettingsError, match=r"assign=rank: fedit would have other devices than"
        ):
            check_fleets(jobs())

    def test_by_share_is_the_same_for_all(self):
        check_fleets(jobs("devices.assign=share"))

    def test_without_a_clock_nothing_is_compared(self):
        check_fleets({("", name, 0): compose([]) for name in "ab"})
        check_fleets({("", name, 0): compose(["devices=mixed"]) for name in "ab"})

    def test_is_named_below_the_table(self):
        settings = compose(["devices=mixed", "devices.deadline_s=60", "devices.target=0.8"])
        expected = "on phone, jetson, laptop_gpu, server_gpu, assigned by rank, deadline 60 s"
        assert fleet_line(settings) == f"{expected}, target 0.8"
        assert not fleet_line(compose([]))


def curve(test, simulated=(), to_target=math.nan):
    sent = tuple(range(len(test)))
    return Curve(test, test, sent, sent, simulated=simulated, seconds_to_target=to_target)


class TestTheTable:
    def test_has_the_seconds_to_the_baselines_end(self):
        baseline = {0: curve((0.1, 0.4, 0.5)), 1: curve((0.1, 0.2, 0.3))}
        runs = {
            0: curve((0.1, 0.6, 0.7), (0.0, 30.0, 50.0), 30.0),
            1: curve((0.1, 0.2, 0.25), (0.0, 20.0, 40.0)),
        }

        row = make_row("", "hafl", 0.01, 8, runs, baseline)

        assert row.simulated_seconds == Spread((50.0, 40.0))
        assert row.seconds_to_baseline == Spread((30.0,))  # seed 1 stays below 0.3
        assert row.seconds_to_target == Spread((30.0,))
        source = Provenance("t", "b", "c", "h", (0, 1), "l", "v", devices="on phone")
        header, _, line, *_ = markdown([row], {}, source).splitlines()[2:]
        for column in ("simulated s", "simulated s to baseline", "simulated s to target"):
            assert f" {column} |" in header
        cells = [cell.strip() for cell in line.strip(" |").split("|")]
        assert cells[-3:] == ["45.0", "30.0", "30.0 (1 of 2 seeds)"]
        assert "- simulated seconds: on phone\n" in markdown([row], {}, source)

    def test_has_no_such_columns_without_a_clock(self):
        row = make_row("", "hafl", 0.01, 8, {0: curve((0.1, 0.6))}, {0: curve((0.1, 0.5))})
        assert "imulated" not in markdown([row], {}, Provenance("t", "b", "c", "h", (0,), "l", "v"))

    def test_reads_them_from_a_runs_folder(self, tmp_path):
        line = {"kind": "round", "bytes_down": 5, "bytes_up": 3, "metrics": {"test/accuracy": 0.5}}
        lines = [{**line, "simulated_seconds": s} for s in (0.0, 4.0, 6.0)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        reached = {"to_target": {"target": 0.5, "phase": "test", "round": 1, "seconds": 4.0}}
        (tmp_path / "summary.json").write_text(json.dumps({"simulated_time": reached}))

        its = read_curve(tmp_path)

        assert its.simulated == (0.0, 4.0, 10.0)
        assert its.seconds_to_target == 4.0
