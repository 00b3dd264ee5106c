"""A comparison from end to end: identical conditions, a table that adds up, nothing run twice."""

import csv
import json
import shutil
import statistics

import pytest
import yaml
from compare_arguments import overruled
from matplotlib import image

from hafl_app.client import handlers
from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments import running
from hafl_app.experiments.command import parse_command
from hafl_app.experiments.compare import compare
from scripts import compare as script

pytestmark = pytest.mark.slow  # whole federations

METHODS = ("freezing-adaptive", "truncation-zero_padding", "fedit")
BASELINE = "truncation-zero_padding"
TINY = (
    "experiment=hafl_banking77",
    f"methods={','.join(METHODS)}",
    "model=tiny_random",
    "model.num_layers=null",
    "dataset=synthetic",
    "dataset.num_train=200",
    "dataset.num_test=60",
    "dataset.max_length=16",
    "partition.min_examples=4",
    "client.batch_size=16",
    "federation.num_clients=4",
    "federation.num_rounds=2",
    "federation.fraction_train=0.75",
    "federation.cohort=1",  # a measurement may choose otherwise
    "compare.tuning.learning_rates=[3e-3,2e-2]",
    "compare.tuning.num_rounds=1",
)
SEEDS = (0, 1)


def run(folder, *more):
    lines = []
    command = parse_command(overruled(*TINY, "seeds=0,1", *more, f"output_dir={folder}"))
    failed = compare(command, "the command line", lines.append)
    return failed, lines


def records(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "out"
    failed, lines = run(folder)
    assert failed == 0
    return folder, lines


@pytest.fixture
def counted(monkeypatch):
    """Return the list of output folders of the federations that really run."""
    ran = []
    real = running.run_federation

    def count(overrides, on_round=None):
        ran.append(compose(overrides).output_dir)
        real(overrides, on_round)

    monkeypatch.setattr(running, "run_federation", count)
    return ran


class TestOutput:
    def test_everything_is_there(self, finished):
        folder, lines = finished
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert files == {
            *("table.md", "table.csv", "results.json", "comparison.png", "tuning.json"),
            ".comparison.lock",
        }
        for method in METHODS:
            for seed in SEEDS:
                summary = json.loads((folder / method / f"seed{seed}/summary.json").read_text())
                assert summary["status"] == "finished"
        assert image.imread(folder / "comparison.png").std() > 0.01
        assert any((folder / "table.md").read_text() in line for line in lines)

    def test_the_table_says_where_it_comes_from(self, finished):
        text = (finished[0] / "table.md").read_text()
        for part in ("`the command line`", "seeds: 0, 1", "cores of", "torch ", "seed 1000"):
            assert part in text

    def test_a_client_alone_is_measured_once_and_at_both_ranks(self, finished):
        folder, _ = finished
        for method in METHODS:
            rows = json.loads((folder / method / "seed0/summary.json").read_text())["device_ranks"]
            assert bool(rows) == (method == "freezing-adaptive")
            for row in rows:
                assert len(row["alone_at_max_rank_each"]) == row["clients_alone"] == 1
            if rows:  # at the largest rank both are the same training
                assert rows[-1]["alone_at_max_rank"] == rows[-1]["alone"]
        assert "alone, max rank" in (folder / "table.md").read_text()
        assert "at max rank" in (folder / "freezing-adaptive/seed0/run.log").read_text()


class TestIdenticalConditions:
    def test_the_same_clients_with_the_same_data_in_the_same_rounds(self, finished):
        folder, _ = finished
        for seed in SEEDS:
            took_part = [
                [
                    (c["server_round"], c["partition_id"], c["num_examples"])
                    for c in records(folder / method / f"seed{seed}", "client")
                ]
                for method in METHODS
            ]
            assert len(took_part[0]) == 2 * 3  # rounds, three of four clients
            assert took_part.count(took_part[0]) == len(METHODS)

    def test_the_same_budgets_where_ranks_are_mixed(self, finished):
        folder, _ = finished
        ranks = [
            [c["rank"] for c in records(folder / method / "seed0", "client")]
            for method in METHODS[:2]
        ]
        assert ranks[0] == ranks[1]
        assert len(set(ranks[0])) > 1

    def test_only_the_method_and_its_learning_rate_differ(self, finished):
        folder, _ = finished
        configs = [
            yaml.safe_load((folder / method / "seed0/config.yaml").read_text())
            for method in METHODS
        ]
        for config in configs:
            del config["client"]["learning_rate"]
            config["federation"].pop("alone_clients_per_rank")
            config["federation"].pop("alone_at_max_rank")
        for part in ("dataset", "model", "partition", "client", "federation", "seed"):
            assert all(config[part] == configs[0][part] for config in configs)

    def test_seeds_partition_differently(self, finished):
        folder, _ = finished
        sizes = [
            {c["partition_id"]: c["num_examples"] for c in records(folder / "fedit" / s, "client")}
            for s in ("seed0", "seed1")
        ]
        assert sizes[0] != sizes[1]


class TestTable:
    def test_numbers_by_hand(self, finished):
        folder, _ = finished
        rows = {r["method"]: r for r in json.loads((folder / "results.json").read_text())["rows"]}
        assert list(rows) == list(METHODS)
        for method, row in rows.items():
            final, best, reached, down, up = [], [], [], [], []
            for seed in SEEDS:
                rounds = records(folder / method / f"seed{seed}", "round")
                target = records(folder / BASELINE / f"seed{seed}", "round")[-1]
                final.append(rounds[-1]["metrics"]["test/accuracy"])
                # By accuracy, among equals by loss.
                merits = [
                    (r["metrics"]["validation/accuracy"], -r["metrics"]["validation/loss"])
                    for r in rounds[1:]
                ]
                best_round = rounds[1:][merits.index(max(merits))]
                best.append(best_round["metrics"]["test/accuracy"])
                down.append(sum(r["bytes_down"] for r in rounds) / 1e6)
                up.append(sum(r["bytes_up"] for r in rounds) / 1e6)
                sent = 0.0
                for r in rounds:
                    sent += (r["bytes_down"] + r["bytes_up"]) / 1e6
                    if r["metrics"]["test/accuracy"] >= target["metrics"]["test/accuracy"]:
                        reached.append((r["server_round"], sent))
                        break
            assert row["final_each"] == final
            assert row["final_mean"] == pytest.approx(statistics.fmean(final))
            assert row["final_sd"] == pytest.approx(statistics.stdev(final))
            assert row["best_each"] == best
            assert row["rounds_to_baseline_each"] == [at for at, _ in reached]
            assert row["mb_to_baseline_each"] == pytest.approx([mb for _, mb in reached])
            assert row["mb_down_mean"] == pytest.approx(statistics.fmean(down))
            assert row["mb_up_mean"] == pytest.approx(statistics.fmean(up))

    def test_csv_and_json_agree(self, finished):
        folder, _ = finished
        results = json.loads((folder / "results.json").read_text())["rows"]
        with (folder / "table.csv").open() as stream:
            lines = list(csv.DictReader(stream))
        for line, row in zip(lines, results, strict=True):
            assert line["method"] == row["method"]
            assert float(line["final_mean"]) == row["final_mean"]

    def test_equal_mean_bytes_are_not_exceeded_and_nearly_reached(self, finished):
        folder, _ = finished
        rows = {r["method"]: r for r in json.loads((folder / "results.json").read_text())["rows"]}
        assert rows["fedit"]["max_rank"] == 5  # the mean of 2, 4, 8, 8 is 5.5
        everybody = ("federation.fraction_train=1", "federation.num_rounds=1", "tune=false")
        run(folder / "all", *everybody, "methods=fedit,truncation-zero_padding")
        all_rows = json.loads((folder / "all/results.json").read_text())["rows"]
        fedit, mixed = (r["mb_down_mean"] + r["mb_up_mean"] for r in all_rows)
        assert 0.8 * mixed < fedit <= mixed


class TestTuning:
    def test_the_best_validation_accuracy_wins(self, finished):
        folder, lines = finished
        found = {
            entry["method"]: entry for entry in json.loads((folder / "tuning.json").read_text())
        }
        assert list(found) == list(METHODS)
        for method, entry in found.items():
            scores = {
                rate: records(folder / "tuning" / method / f"lr{rate}", "round")[-1]["metrics"][
                    f"validation/{entry['metric']}"
                ]
                for rate in (0.003, 0.02)
            }
            assert entry["learning_rate"] == max(scores, key=scores.get)
            config = yaml.safe_load((folder / method / "seed0/config.yaml").read_text())
            assert config["client"]["learning_rate"] == entry["learning_rate"]
        assert sum("learning rate" in line and "grid" in line for line in lines[:-2]) == 3

    def test_on_a_seed_and_a_length_of_its_own(self, finished):
        config = yaml.safe_load((finished[0] / "tuning/fedit/lr0.02/config.yaml").read_text())
        assert config["seed"] == 1000
        assert config["federation"]["num_rounds"] == 1
        assert config["federation"]["alone_clients_per_rank"] == 0

    def test_without_it_the_experiment_file_decides(self, tmp_path, counted):
        run(tmp_path, "tune=false", "seeds=0", f"methods={BASELINE}")
        config = yaml.safe_load((tmp_path / BASELINE / "seed0/config.yaml").read_text())
        written = compose(["experiment=hafl_banking77"]).compare.methods[BASELINE].learning_rate
        assert config["client"]["learning_rate"] == written
        assert len(counted) == 1
        assert not (tmp_path / "tuning.json").exists()


class TestResuming:
    def test_finished_runs_are_kept(self, finished, counted):
        folder, _ = finished
        before = (folder / "results.json").read_text()
        run(folder)
        assert counted == []
        assert (folder / "results.json").read_text() == before

    def test_only_what_is_missing_or_different_runs(self, finished, counted):
        folder, _ = finished
        (folder / "fedit/seed1/summary.json").unlink()
        config = folder / "fedit/seed0/config.yaml"
        config.write_text(config.read_text().replace("batch_size: 16", "batch_size: 17"))
        run(folder)
        assert sorted(counted) == [str(folder / "fedit/seed0"), str(folder / "fedit/seed1")]

    def test_a_failed_run_costs_its_row_and_no_more(self, tmp_path, monkeypatch):
        real = running.run_federation

        def fail(overrides, on_round=None):
            if "strategy=fedit" in overrides:
                raise RuntimeError("disk full\nand more")
            real(overrides, on_round)

        monkeypatch.setattr(running, "run_federation", fail)
        failed, lines = run(tmp_path, "tune=false", "seeds=0", f"methods={BASELINE},fedit")
        assert failed == 1
        assert any("fedit seed 0: FAILED: RuntimeError: disk full" in line for line in lines)
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        assert [row["method"] for row in rows] == [BASELINE]

    def test_a_run_in_which_a_client_failed_says_so(self, tmp_path, monkeypatch):
        real = handlers.train_locally

        def fail(classifier, adapter, plan, *rest, **named):
            if len(next(iter(plan.modules.values())).trainable) == 2:
                raise RuntimeError("out of memory")
            return real(classifier, adapter, plan, *rest, **named)

        monkeypatch.setattr(handlers, "train_locally", fail)
        _, lines = run(tmp_path, "tune=false", "seeds=0", f"methods={BASELINE}")
        failures = sum(r["failures"] for r in records(tmp_path / BASELINE / "seed0", "round"))
        assert failures > 0
        assert any(f"{failures} TRAININGS FAILED" in line for line in lines)
        assert "out of memory" in (tmp_path / BASELINE / "seed0/run.log").read_text()

    def test_two_processes_find_the_same(self, finished, tmp_path, counted):
        shutil.copytree(finished[0] / "tuning", tmp_path / "tuning")
        run(tmp_path, "workers=2", f"methods={BASELINE}")
        assert counted == []  # not in this process
        for seed in SEEDS:
            metrics = [
                [r["metrics"] for r in records(folder / BASELINE / f"seed{seed}", "round")]
                for folder in (tmp_path, finished[0])
            ]
            assert metrics[0] == metrics[1]


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "experiment= or methods= must be given"),
            (["experiment=hafl_bankin"], "did you mean hafl_banking77?"),
            (["experiment=demo"], "it has no compare.methods"),
            ([*TINY, "seeds=abc"], "seeds=abc: expected whole numbers"),
            ([*TINY, "seeds=1,1"], "a seed comes twice"),
            ([*TINY, "seeds=0,1000"], "1000 is the seed of the tuning"),
            ([*TINY, "seed=1"], "takes seeds="),
            ([*TINY, "workers=0"], "expected at least 1"),
            ([*TINY, "tune=maybe"], "expected true or false"),
            ([*TINY, "--seeds"], "expected key=value"),
            ([*TINY, "methods=fedti"], "did you mean fedit?"),
            ([*TINY, "methods=fedit"], "not among the methods compared"),
            ([*TINY, "cells=x"], "cells=x"),
            ([*TINY, "resume=x"], "goes on where it stopped with output_dir="),
            ([*TINY, "seeds="], "seeds=: expected a value"),
            ([*TINY, "methods=fedit,fedit"], "fedit comes twice"),
            ([*TINY, "engine=ray"], "in process"),
            ([*TINY, "client.learning_rate=1e-3"], "tune=false"),
            ([*TINY, "strategy.scheme=freezing"], "set by the method freezing-adaptive"),
            ([*TINY, "model.head=local"], "no global model"),
            ([*TINY, "dataset.validation_fraction=0"], "nothing to tune on"),
            ([*TINY, "federation.num_round=3"], "did you mean federation.num_rounds?"),
        ],
    )
    def test_is_refused_in_one_line(self, arguments, message, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(
            script.sys, "argv", ["compare.py", *overruled(*arguments), f"output_dir={tmp_path}"]
        )
        assert script.main() != 0
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert message in said
        assert len(said.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []

    def test_an_unknown_reference_of_equal_bytes(self, tmp_path):
        with pytest.raises(SettingsError, match="equal_mean_bytes=nobody"):
            run(tmp_path, "compare.methods.fedit.equal_mean_bytes=nobody")
