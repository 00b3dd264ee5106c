"""Sweeps: what is recorded of their jobs, the table at the end, and how they are planned."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments import sweep
from hafl_app.experiments.sweep import SWEEP_FILE, SweepJob, print_sweep, read_sweep
from hafl_app.run import sweep_plan
from hafl_app.run.command_line import CommandLine

TINY = ("model=tiny_random", "engine=inprocess")


def job(tmp_path, monkeypatch, number, overrides, run, at_once=False):
    """Call a job as Hydra does; ``run`` stands in for the federation."""
    hydra = SimpleNamespace(
        runtime=SimpleNamespace(output_dir=str(tmp_path / str(number))),
        overrides=SimpleNamespace(task=[*overrides, "output_dir=elsewhere"]),
        sweep=SimpleNamespace(dir=str(tmp_path)),
        job=SimpleNamespace(num=number),
    )
    monkeypatch.setattr(sweep.HydraConfig, "get", staticmethod(lambda: hydra))
    monkeypatch.setattr(sweep, "run_once", run)
    return SweepJob(3, ("seed",), at_once, ("hafl", "simulate"), ("-m", "seed=0,1"))(
        OmegaConf.create()
    )


def finished(overrides, folder, value=0.75):
    folder.mkdir(parents=True, exist_ok=True)
    final = {"validation/accuracy": value, "test/accuracy": 0.5, "clients/accuracy": 0.1}
    text = json.dumps({"status": "finished", "metric": "accuracy", "final": final})
    (folder / "summary.json").write_text(text)
    sys.stdout.write("a line of the run\n")


def refused(overrides, folder):
    raise ValueError("the folder holds a run")


def broken(overrides, folder):
    raise RuntimeError("no replies")


def interrupted(overrides, folder):
    raise KeyboardInterrupt


class TestJobs:
    def test_each_is_announced_recorded_and_scored(self, tmp_path, monkeypatch, capsys):
        value = job(tmp_path, monkeypatch, 1, ["lora.max_rank=4", "seed=7"], finished)

        assert value == 0.75  # of the validation data, which a sweeper may search by
        lines = capsys.readouterr().out.strip().splitlines()
        assert lines == ["[2/3] seed=7", "a line of the run"]
        (record,) = read_sweep(tmp_path)
        assert (record.job, record.folder, record.status) == (1, "1", "finished")
        assert record.settings == {"lora.max_rank": "4", "seed": "7"}

    def test_beside_others_it_prints_one_line_and_logs_the_rest(
        self, tmp_path, monkeypatch, capsys
    ):
        job(tmp_path, monkeypatch, 0, ["seed=7"], finished, at_once=True)

        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("[1/3] seed=7: validation 75.0%  test 50.0%")
        assert (tmp_path / "0" / "run.log").read_text() == "a line of the run\n"

    @pytest.mark.parametrize(("run", "status"), [(refused, "refused"), (broken, "failed")])
    def test_one_that_fails_does_not_raise(self, run, status, tmp_path, monkeypatch, capsys):
        assert job(tmp_path, monkeypatch, 0, ["seed=7"], run) is None

        (record,) = read_sweep(tmp_path)
        assert record.status == status
        assert record.error in capsys.readouterr().err

    def test_an_interruption_is_recorded_and_goes_on(self, tmp_path, monkeypatch):
        with pytest.raises(KeyboardInterrupt):
            job(tmp_path, monkeypatch, 0, ["seed=7"], interrupted)
        assert [record.status for record in read_sweep(tmp_path)] == ["interrupted"]


class TestTable:
    def test_has_what_differs_the_scores_and_the_state_of_every_job(
        self, tmp_path, monkeypatch, capsys
    ):
        same = ["strategy=hafl", "lora.max_rank=4", "output_dir=there"]
        jobs = [[*same, f"seed={seed}"] for seed in (0, 1, 2)]
        job(tmp_path, monkeypatch, 1, jobs[1], broken)
        job(tmp_path, monkeypatch, 0, jobs[0], finished)
        console = Console(file=io.StringIO(), width=100)
        monkeypatch.setattr(sweep, "Console", lambda width: console)

        assert print_sweep(tmp_path, jobs, console) == 2

        cells = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in console.file.getvalue().strip().splitlines()
        ]
        assert cells[0] == ["job", "seed", "validation", "test", "state"]
        assert cells[2:] == [
            ["0", "0", "75.0%", "50.0%", "finished"],
            ["1", "1", "-", "-", "failed"],
            ["2", "2", "-", "-", "not run"],
        ]
        assert f"Written: {SWEEP_FILE}" in capsys.readouterr().out

    def test_a_damaged_file_is_named(self, tmp_path):
        (tmp_path / SWEEP_FILE).write_text('{"job": 0}\n')
        with pytest.raises(ValueError, match=rf"{SWEEP_FILE}, line 1: .*folder"):
            read_sweep(tmp_path)


def plan(*arguments, hydra=None):
    line = CommandLine.of(["-m", *TINY, *arguments])
    settings = [compose(overrides) for overrides in line.jobs()]
    return line, settings


class TestPlan:
    @pytest.fixture
    def four_cpus(self, monkeypatch):
        monkeypatch.setattr(sweep_plan, "usable_cpus", lambda: 4)

    def hydra(self, **parts):
        basic = "hydra._internal.core_plugins.basic_"
        return OmegaConf.create(
            {
                "sweep": {"dir": "there"},
                "launcher": {"_target_": f"{basic}launcher.BasicLauncher"},
                "sweeper": {"_target_": f"{basic}sweeper.BasicSweeper"},
                **parts,
            }
        )

    def test_jobs_run_one_by_one_in_a_known_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        line, settings = plan("seed=0,1")
        found = line.sweep(line.placed(settings), settings)
        assert (found.num_jobs, found.at_once, found.searches) == (2, False, False)
        assert found.varied == ("seed",)
        assert found.folder.parent.parent == tmp_path / "outputs"

    @pytest.mark.parametrize(
        ("workers", "threads", "warns"), [(4, 1, 0), (-1, 1, 0), (-1, 2, 1), (2, 2, 0), (2, 3, 1)]
    )
    def test_more_threads_than_cpus_are_warned_of(self, workers, threads, warns, four_cpus):
        line, settings = plan("seed=range(8)", f"client.num_threads={threads}")
        hydra = self.hydra(launcher={"_target_": "joblib", "n_jobs": workers})
        found = sweep_plan.SweepPlan.of(hydra, [], line.varied(), settings)
        assert len(found.warnings) == warns
        assert found.at_once

    def test_side_by_side_needs_the_engine_in_process(self):
        _, settings = plan("engine=ray")
        hydra = self.hydra(launcher={"_target_": "joblib", "n_jobs": 2})
        with pytest.raises(SettingsError, match="add engine=inprocess"):
            sweep_plan.SweepPlan.of(hydra, [], [], settings)

    def test_a_sweeper_that_searches_is_told_which_way(self):
        sweeper = {"_target_": "optuna", "n_trials": 7, "direction": "minimize"}
        hydra = self.hydra(sweeper={**sweeper, "max_failure_rate": 0.0})
        _, settings = plan("seed=0")
        found = sweep_plan.SweepPlan.of(hydra, [], [], settings)
        assert (found.num_jobs, found.searches) == (7, True)
        assert found.overrides[1:] == (
            "hydra.sweeper.direction=maximize",  # accuracy
            "hydra.sweeper.max_failure_rate=1.0",
        )
        typed = ["hydra.sweeper.direction=minimize", "hydra.sweeper.max_failure_rate=0"]
        assert len(sweep_plan.SweepPlan.of(hydra, typed, [], settings).overrides) == 1

    def test_both_ends_of_an_interval_are_checked_before_the_start(self, monkeypatch):
        monkeypatch.setattr(sweep_plan, "distribution", lambda name: None)
        monkeypatch.setattr(CommandLine, "hydra_settings", lambda self: None)
        line = CommandLine.of(
            ["-m", "hydra/sweeper=optuna", "client.learning_rate=interval(-1,1)", "seed=0,1,2"]
        )
        assert line.jobs() == [
            ["client.learning_rate=-1.0", "seed=0"],
            ["client.learning_rate=1.0", "seed=1"],
            ["client.learning_rate=-1.0", "seed=2"],
        ]

    def test_an_interval_without_a_search_is_one_line(self):
        with pytest.raises(SettingsError, match=r"interval\(0,1\): .*hydra/sweeper=optuna"):
            plan("client.learning_rate=interval(0,1)")

    @pytest.mark.parametrize(
        ("override", "package"),
        [
            ("hydra/launcher=joblib", "hydra-joblib-launcher"),
            ("hydra/sweeper=optuna", "hydra-optuna-sweeper"),
            ("hydra/launcher=ray", "--no-deps hydra-ray-launcher"),
        ],
    )
    def test_a_missing_plugin_is_named_with_its_command(self, override, package, monkeypatch):
        def missing(name):
            raise sweep_plan.PackageNotFoundError(name)

        monkeypatch.setattr(sweep_plan, "distribution", missing)
        with pytest.raises(SettingsError, match=f"pip install .*{package}$"):
            plan(override, "seed=0,1")
