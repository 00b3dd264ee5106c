"""The command line: refusals before anything starts, sweeps, and exit codes."""

import importlib.util
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from running import TINY, records, run_tiny

from hafl_app.experiments.sweep import read_sweep

ROOT = Path(__file__).parents[1]
ALONE = "federation.alone_clients_per_rank=0"
RATES = "client.learning_rate=1e-3,2e-3"


def in_this_process(monkeypatch, capsys, *arguments):
    """Call the command line without a process of its own: imports take seconds."""
    spec = importlib.util.spec_from_file_location("simulate", ROOT / "scripts" / "simulate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["simulate.py", *arguments])
    before = signal.getsignal(signal.SIGTERM)
    try:
        return module.main(), capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


def simulate(*arguments, cwd=ROOT, before=()):
    return subprocess.run(
        [sys.executable, *before, str(ROOT / "scripts" / "simulate.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


TELLING_OF_LOADS = """
import runpy, sys
from hafl_app.training import lora_model

load = lora_model.load_base
lora_model.load_base = lambda *a: print("a base model was loaded") or load(*a)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
REFUSED = [
    (["strategy=haffl"], "did you mean hafl?"),
    (["federation.num_clients=ten"], "federation.num_clients"),
    (["seed=0,1"], "add -m"),
    (["dataset=local", "dataset.path=/no/such.csv"], "/no/such.csv"),
    (["model=encoder", "model.path=/no/such/folder"], "no such folder"),
    (["model=encoder", "model.path=nobody/no-such-model"], "nobody/no-such-model"),
    (["model=encoder"], "model.path must be given"),
    (["lora.max_rank=4"], "above lora.max_rank=4"),
    (["federation.num_clients=5000"], "5000"),
    (["strategy=fedit"], "one rank for all clients"),
    (["lora.target_modules=[qwery]"], "qwery"),
    (["client.device=cuda"], "no CUDA device"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_wrong_input_is_one_line_and_nothing_starts(
    arguments, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    base = [] if "model=encoder" in arguments else ["model=tiny_random"]

    code, printed = in_this_process(monkeypatch, capsys, *base, *arguments)

    assert code == 2
    errors = printed.strip().splitlines()
    assert len(errors) == 1, printed
    assert errors[0].startswith("error: ")
    assert words in errors[0]
    assert not list(tmp_path.iterdir())


def test_a_missing_column_names_the_ones_there_are(tmp_path, monkeypatch, capsys):
    (tmp_path / "data.csv").write_text("txt,label\nhello,a\nbye,b\n")
    data = ("dataset=local", f"dataset.path={tmp_path / 'data.csv'}")
    code, printed = in_this_process(monkeypatch, capsys, "model=tiny_random", *data)
    assert code == 2
    assert "txt" in printed
    assert len(printed.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Return the folder of a sweep over methods and rates, and what the command did."""
    folder = tmp_path_factory.mktemp("sweep")
    jobs = ("-m", *TINY, "engine=inprocess", ALONE, "strategy=hafl,hetlora", RATES)
    return folder, simulate(*jobs, f"hydra.sweep.dir={folder}", before=["-c", TELLING_OF_LOADS])


@pytest.mark.slow
def test_a_sweep_runs_every_job_in_a_folder_of_its_own(sweep):
    folder, result = sweep
    assert result.returncode == 0, result.stderr
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert folders == ["0-hafl", "1-hafl", "2-hetlora", "3-hetlora"]
    assert all((folder / job / "summary.json").exists() for job in folders)


@pytest.mark.slow
def test_a_sweep_counts_its_jobs_lists_them_and_ends_with_a_table(sweep):
    folder, result = sweep
    headings = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert headings == [
        f"[{number}/4] strategy={strategy} client.learning_rate={rate}"
        for number, (strategy, rate) in enumerate(
            [("hafl", 0.001), ("hafl", 0.002), ("hetlora", 0.001), ("hetlora", 0.002)], start=1
        )
    ]
    assert [record.folder for record in read_sweep(folder)] == [
        *("0-hafl", "1-hafl", "2-hetlora", "3-hetlora"),
    ]
    table = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    columns = [cell.strip() for cell in table[0].strip(" |").split("|")]
    assert columns == ["job", "strategy", "learning_rate", "validation", "test", "state"]
    assert len(table) == 5
    assert all("finished" in line for line in table[1:])


PLUGINS = {
    "hydra-joblib-launcher": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"),
    "hydra-optuna-sweeper": (
        *("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"),
        "client.learning_rate=tag(log,interval(1e-3,1e-2))",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_of_hydra_runs_the_jobs(plugin, tmp_path):
    try:
        distribution(plugin)
    except PackageNotFoundError:
        pytest.skip(f"needs {plugin}")
    jobs = (*PLUGINS[plugin], *TINY, ALONE, "engine=inprocess", "federation.num_rounds=1")

    result = simulate("-m", *jobs, f"hydra.sweep.dir={tmp_path}")

    assert result.returncode == 0, result.stderr
    records = read_sweep(tmp_path)
    assert [record.status for record in records] == ["finished", "finished"]
    assert all((tmp_path / record.folder / "summary.json").exists() for record in records)
    assert len({tuple(record.overrides) for record in records}) == 2


@pytest.mark.slow
def test_the_jobs_of_a_sweep_share_one_base_model_and_end_as_single_runs(sweep, tmp_path):
    folder, result = sweep
    assert result.stdout.count("a base model was loaded") == 1
    # The last one, which comes after what the others have left behind.
    run_tiny(tmp_path / "single", ALONE, "strategy=hetlora", "client.learning_rate=2e-3")
    last = records(folder / "3-hetlora", "round")
    assert last == records(tmp_path / "single", "round")


@pytest.mark.slow
def test_a_failed_job_fails_the_command_and_not_the_sweep(tmp_path):
    # Ten million is a loss that is not finite: the client refuses to go on.
    result = simulate(
        *("-m", *TINY, "engine=inprocess", ALONE, "federation.num_rounds=1"),
        *("client.learning_rate=1e30,1e-3", "client.max_grad_norm=0"),
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )
    assert result.returncode == 1
    assert "the replies of 0 of 5 clients count" in result.stderr
    assert "[2/2] client.learning_rate=0.001" in result.stdout
    assert [record.status for record in read_sweep(tmp_path / "sweep")] == ["failed", "finished"]
    assert result.stderr.rstrip().endswith("error: 1 jobs did not finish, see above")
    assert '"status": "failed"' in (tmp_path / "sweep" / "0-hafl" / "summary.json").read_text()
    assert '"status": "finished"' in (tmp_path / "sweep" / "1-hafl" / "summary.json").read_text()
