"""The machinery of a table of many methods, with federations that only write their results."""

import json
from pathlib import Path
from unittest import mock

import pytest
from compare_arguments import overruled
from omegaconf import OmegaConf

from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments import running
from hafl_app.experiments.command import parse_command
from hafl_app.experiments.compare import compare
from hafl_app.experiments.comparison import Comparison, Rates
from hafl_app.experiments.comparison_folder import comparison_lock
from hafl_app.run.plain_settings import plain_settings
from hafl_app.run.run_lock import RunLockedError, run_lock

TINY = (
    "experiment=shelf_banking77",
    "cells=dirichlet-0.1",
    "model=tiny_random",
    "model.num_layers=null",
    "dataset=synthetic",
    "dataset.num_train=600",
    "dataset.num_test=60",
    "dataset.max_examples=null",
    "partition.min_examples=2",
    "federation.num_clients=15",
    "compare.tuning.learning_rates=[1e-2,1e-1]",
    "compare.tuning.lora_B_lr_ratios=[1,5]",
)
METHODS = "methods=fedit,zero_padding,rbla"
# Validation accuracy by learning rate and ratio: rates alone, at ratio 1, would choose the other.
VALIDATION = {(1e-2, 1): 0.4, (1e-2, 5): 0.6, (1e-1, 1): 0.5}
TEST = {"fedit": [0.40, 0.50], "zero_padding": [0.45, 0.57], "rbla": [0.30, 0.50]}


class Federations:
    """Stands for the training: writes what a run leaves behind, and remembers what it ran."""

    def __init__(self):
        self.ran = []
        self.failing = ""

    def __call__(self, overrides, on_round=None):
        settings = compose(overrides)
        folder = Path(settings.output_dir)
        self.ran.append(folder)
        method = type(settings.strategy).__name__.lower()
        rates = settings.client.learning_rate, settings.client.lora_B_lr_ratio
        if self.failing == method or (rates not in VALIDATION and settings.seed == 1000):
            raise RuntimeError("diverged")
        name = {"zeropadding": "zero_padding"}.get(method, method)
        test = 0.1 if settings.seed == 1000 else TEST[name][settings.seed]
        metrics = {"validation/accuracy": VALIDATION[rates], "test/accuracy": test}
        line = {"kind": "round", "server_round": 1, "bytes_down": 2_000_000, "bytes_up": 1_000_000}
        ranks = [settings.lora.max_rank] if name == "fedit" else [2, 4, 8, 16]
        scored = settings.federation.score_device_ranks
        summary = {
            "status": "finished",
            "device_ranks": [{"rank": r, "federated": r / 20} for r in ranks if scored],
            "cpu_seconds": {"clients": 12.0, "server": 0.5},
        }
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(plain_settings(settings)))
        (folder / "metrics.jsonl").write_text(json.dumps({**line, "metrics": metrics}))
        (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def federations(monkeypatch):
    found = Federations()
    monkeypatch.setattr(running, "run_federation", found)
    return found


def run(folder, *more):
    lines = []
    arguments = overruled(*TINY, METHODS, "seeds=0,1", *more, f"output_dir={folder}")
    command = parse_command(arguments)
    return compare(command, "as typed", lines.append), lines


def planned(folder):
    """Return the runs of the finished comparison."""
    comparison = Comparison.of(parse_command([*TINY, METHODS, "seeds=0,1"]), folder)
    keys = [("dirichlet-0.1", method) for method in comparison.methods]
    return comparison.jobs(dict.fromkeys(keys, Rates(0.01, 5.0)))


def results(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["method"]: row for row in rows}


class TestRates:
    def planned(self, *more):
        command = parse_command([*TINY, "methods=zero_padding,lora_a2", *more])
        return Comparison.of(command, Path("out"))

    def test_every_rate_is_tried_with_every_ratio(self):
        jobs = self.planned().tuning_jobs()
        pairs = [(1e-2, 1), (1e-2, 5), (1e-1, 1), (1e-1, 5)]
        for method in ("zero_padding", "lora_a2"):
            its = [compose(job.overrides) for job in jobs if job.method == method]
            rates = [(one.client.learning_rate, one.client.lora_B_lr_ratio) for one in its]
            assert rates == pairs
            assert all(not one.federation.score_device_ranks for one in its)
        assert len({job.folder for job in jobs}) == len(jobs) == 8

    def test_without_ratios_a_method_keeps_its_own(self):
        jobs = self.planned("compare.tuning.lora_B_lr_ratios=[]").tuning_jobs()
        ratios = {job.method: compose(job.overrides).client.lora_B_lr_ratio for job in jobs}
        assert ratios == {"zero_padding": 1, "lora_a2": 5}
        assert {job.folder.name for job in jobs} == {"lr0.01", "lr0.1"}

    def test_without_a_search_the_file_decides(self):
        own = ("tune=false", "+compare.methods.zero_padding.lora_B_lr_ratio=3")
        rates = self.planned(*own).fixed_rates()
        assert rates["dirichlet-0.1", "zero_padding"].ratio == 3
        assert rates["dirichlet-0.1", "lora_a2"].ratio is None
        given = self.planned(*own, "client.lora_B_lr_ratio=2").fixed_rates()
        assert given["dirichlet-0.1", "zero_padding"].ratio is None

    def test_a_ratio_for_all_contradicts_a_search(self):
        with pytest.raises(SettingsError, match=r"client\.lora_B_lr_ratio: set by the tuning"):
            self.planned("client.lora_B_lr_ratio=2")

    def test_names_itself(self):
        assert [str(Rates(0.01)), str(Rates(0.01, 5.0))] == ["0.01", "0.01 ratio 5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of three methods on two seeds: folder, lines said, and its federations."""
    folder, found = tmp_path_factory.mktemp("shelf"), Federations()
    with mock.patch.object(running, "run_federation", found):
        failed, lines = run(folder)
    assert failed == 0  # a trial that diverges is no failed run
    return folder, lines, list(found.ran)


def grids(folder):
    """Return the tables of a ``table.md``, each as rows of cells by method."""
    blocks = (folder / "table.md").read_text().split("\n\n")
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        for block in blocks
        if block.startswith("|")
    ]
    return [{row[0]: row[1:] for row in table} for table in tables]


class TestTable:
    def test_the_best_pair_trains_and_stands_in_the_row(self, finished):
        folder, lines, _ = finished
        for row in results(folder).values():
            assert (row["learning_rate"], row["lora_B_lr_ratio"]) == (0.01, 5)
        (entry, *_) = json.loads((folder / "tuning.json").read_text())
        assert entry["validation"]["0.1 ratio 5"] is None  # diverged, and does not count
        assert sum("FAILED: RuntimeError: diverged" in line for line in lines) == 3
        assert "of 0.01, 0.1 and of ratios 1, 5" in (folder / "table.md").read_text()

    def test_one_rank_for_all_is_said_and_has_no_slices(self, finished):
        scores, slices, _ = grids(finished[0])
        assert scores["method"][2] == "lr ratio"
        # Zero padding's clients have ranks 2, 4, 8 and 16, eight, four, two and one of 15: 4.3.
        assert scores["fedit"][0] == "4 for all"
        assert scores["zero_padding"][0] == "2 to 16"
        ranks = ["rank 2", "rank 4", "rank 8", "rank 16"]
        assert slices["method"] == [*ranks, "whole", "client CPU s", "server CPU s"]
        assert slices["fedit"] == ["-", "-", "-", "-", "45.0 ± 7.1", "12.0", "0.500"]
        assert slices["rbla"][:3] == ["10.0 ± 0.0", "20.0 ± 0.0", "40.0 ± 0.0"]

    def test_differences_are_paired_by_seed(self, finished):
        *_, paired = grids(finished[0])
        # 5 and 7 points: 6 +- 12.7062 * sqrt(2) / sqrt(2)
        assert paired["zero_padding"] == ["+6.0", "-6.7 to +18.7", "2"]
        assert list(paired)[2:] == ["zero_padding", "rbla"]  # no row of the baseline's

    def test_says_whose_best_rate_is_at_the_edge_of_the_grid(self, finished):
        names = "; ".join(
            f"dirichlet-0.1 {method} (learning rate 0.01)"
            for method in ("fedit", "zero_padding", "rbla")
        )
        text = (finished[0] / "table.md").read_text()
        assert f"- at the edge of the grid, so that a wider one may be better: {names}\n" in text

    def test_a_ratio_is_at_the_edge_of_three(self, federations, tmp_path):
        few = ("methods=fedit", "seeds=0", "compare.tuning.learning_rates=[0.01]")
        _, lines = run(tmp_path, *few, "compare.tuning.lora_B_lr_ratios=[0.2,1,5]")
        assert any("at the edge of the grid: ratio 5)" in line for line in lines)
        assert "(ratio 5)" in (tmp_path / "table.md").read_text()

    def test_a_seed_that_failed_is_missing_by_name(self, federations, tmp_path, monkeypatch):
        def fail(overrides, on_round=None):
            if "strategy=rbla" in overrides and "seed=1" in overrides:
                raise RuntimeError("out of luck")
            federations(overrides)

        monkeypatch.setattr(running, "run_federation", fail)
        few = ("tune=false", "client.learning_rate=0.01", "client.lora_B_lr_ratio=5")
        failed, _ = run(tmp_path, "methods=fedit,rbla", *few)
        assert failed == 1
        scores = grids(tmp_path)[0]
        assert scores["method"][3] == "seeds"
        assert (scores["fedit"][3], scores["rbla"][3]) == ("-", "1 of 2")
        line = (
            "- failed, and not in the tables: dirichlet-0.1 rbla seed 1: RuntimeError: out of luck"
        )
        assert f"{line}\n" in (tmp_path / "table.md").read_text()

    def test_says_the_precision_and_the_number_of_seeds(self, finished):
        text = (finished[0] / "table.md").read_text()
        assert "- precision: bf16" in text
        assert "- seeds: 0, 1 (2)" in text

    def test_one_seed_has_no_interval(self, finished, federations):
        run(finished[0], "seeds=1")
        row = results(finished[0])["zero_padding"]
        assert row["difference_mean"] == pytest.approx(0.07)
        assert row["difference_low"] is None
        assert grids(finished[0])[-1]["zero_padding"] == ["+7.0", "none (n = 1)", "1"]


class TestGoingOn:
    def test_nothing_that_finished_runs_again(self, finished, federations):
        folder, _, ran = finished
        diverged = [place for place in ran if place.name == "lr0.1-ratio5"]
        run(folder)
        assert federations.ran == diverged

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("metrics.jsonl", ""),
            ("metrics.jsonl", "half a li"),
            ("config.yaml", "seed: [0"),
            ("config.yaml", "- seed"),
            ("summary.json", '{"status": "fini'),
            ("summary.json", "[]"),
        ],
    )
    def test_a_damaged_run_runs_again(self, name, text, finished, federations, monkeypatch):
        folder, *_ = finished
        place = folder / "dirichlet-0.1/rbla/seed0"
        kept = {path: path.read_text() for path in place.iterdir() if path.is_file()}
        monkeypatch.setattr(running, "set_aside", lambda folder: None)
        (place / name).write_text(text)
        try:
            run(folder)
            assert place in federations.ran
        finally:
            for path, content in kept.items():
                path.write_text(content)

    def test_a_finished_run_of_other_settings_is_kept_and_named(self, federations, tmp_path):
        few = ("methods=fedit", "seeds=0", "tune=false", "client.learning_rate=0.01")
        few = (*few, "client.lora_B_lr_ratio=5")
        run(tmp_path, *few)
        _, lines = run(tmp_path, *few, "federation.num_rounds=1")
        place = tmp_path / "dirichlet-0.1/fedit/seed0-before"
        assert f"a finished run of other settings was there; it is kept as {place}" in lines
        assert (place / "summary.json").exists()

    def test_a_run_that_goes_on_elsewhere_is_left_as_it_is(self, federations, tmp_path):
        few = ("methods=fedit", "seeds=0", "tune=false")
        place = tmp_path / "dirichlet-0.1/fedit/seed0"
        place.mkdir(parents=True)
        (place / "run.log").write_text("of the other process")
        (place / "checkpoints").mkdir()
        (place / "checkpoints/round-00001.safetensors").write_text("")
        with run_lock(place):
            failed, lines = run(tmp_path, *few)
        assert failed == 1
        assert "is still running this" in " ".join(lines)
        assert (place / "run.log").read_text() == "of the other process"
        assert (place / "checkpoints/round-00001.safetensors").exists()

    def test_a_folder_that_another_process_writes_is_left_as_it_is(self, federations, tmp_path):
        with comparison_lock(tmp_path), pytest.raises(RunLockedError, match="still running this"):
            run(tmp_path, "methods=fedit", "seeds=0", "tune=false")
        assert federations.ran == []
        assert [path.name for path in tmp_path.iterdir()] == [".comparison.lock"]

    def test_a_folder_of_another_experiment_is_left_as_it_is(self, federations, tmp_path):
        (tmp_path / "results.json").write_text('{"experiment": "digits"}')
        with pytest.raises(SettingsError, match="a comparison of experiment=digits"):
            run(tmp_path, "methods=fedit", "seeds=0", "tune=false")
        assert federations.ran == []
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]

    def test_says_of_which_experiment_it_is(self, finished):
        written = json.loads((finished[0] / "results.json").read_text())
        assert written["experiment"] == "shelf_banking77"

    def test_warns_of_what_was_typed_without_effect(self, federations, tmp_path):
        few = ("methods=fedit", "seeds=0", "client.schedule.final=0.1")
        _, lines = run(tmp_path, *few)
        assert lines[0].startswith("warning: client.schedule.final=0.1 has no effect with")

    def test_runs_of_an_older_version_are_kept_if_asked(self, finished, federations):
        folder, *_ = finished
        place = folder / "dirichlet-0.1/rbla/seed0"
        settings = compose(next(j for j in planned(folder) if j.folder == place).overrides)
        older = OmegaConf.create(plain_settings(settings))
        del (
            older.client.max_steps,
            older.federation.cohort,
            older.federation.quarantine,
        )  # settings that did not exist then
        before = (place / "config.yaml").read_text()
        try:
            (place / "config.yaml").write_text(OmegaConf.to_yaml(older))
            assert not running.is_finished(place, settings)
            assert not running.is_finished(place, settings, older=True)  # cohort: not its default
            older.federation.cohort = settings.federation.cohort
            (place / "config.yaml").write_text(OmegaConf.to_yaml(older))
            assert not running.is_finished(place, settings)
            assert running.is_finished(place, settings, older=True)
            run(folder, "older=true")
            assert place not in federations.ran
        finally:
            (place / "config.yaml").write_text(before)

    def test_a_stopped_comparison_has_the_rows_of_methods_that_are_whole(
        self, federations, tmp_path, monkeypatch
    ):
        def stop(overrides, on_round=None):
            if "strategy=rbla" in overrides:
                raise KeyboardInterrupt
            federations(overrides)

        monkeypatch.setattr(running, "run_federation", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "methods=fedit,rbla", "seeds=0", "compare.tuning.learning_rates=[0.01]")
        assert list(results(tmp_path)) == ["fedit"]

    def test_a_method_without_a_rate_that_works_costs_its_row_only(self, federations, tmp_path):
        federations.failing = "rbla"
        one = ("methods=fedit,rbla", "seeds=0", "compare.tuning.learning_rates=[0.01]")
        failed, lines = run(tmp_path, *one)
        assert failed == 1
        line = "dirichlet-0.1 rbla: no learning rate of 0.01 ratio 1, 0.01 ratio 5 works"
        assert f"FAILED: {line}" in " ".join(lines)
        assert f"- failed, and not in the tables: {line}" in (tmp_path / "table.md").read_text()
        assert list(results(tmp_path)) == ["fedit"]
