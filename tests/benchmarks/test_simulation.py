"""All ways of simulating end with the same adapter, or nothing is timed."""

import json

import pytest
import torch
from benchmarks import simulation
from benchmarks.simulation import Measurement, Run, check_agreement, measure, report, ways
from benchmarks.simulation_loop import has_pfl, run_loop, run_pfl
from benchmarks.simulation_ours import run_inprocess
from benchmarks.simulation_task import SimulationTask
from benchmarks.timing import DisagreementError
from programs import run_program

NOTHING = SimulationTask(3, 2, 40_000)
TRAINING = SimulationTask(
    *(2, 2, 0),
    (
        *("model=tiny_random", "dataset=synthetic", "dataset.num_train=60", "dataset.num_test=20"),
        *("client.batch_size=8", "client.learning_rate=1.0", "partition=dirichlet"),
    ),
)
TASKS = pytest.mark.parametrize("task", [NOTHING, TRAINING], ids=["nothing", "training"])
WAYS = [run_inprocess, *([run_pfl] if has_pfl() else [])]
RUNNERS = {"loop": run_loop, "ours in process": run_inprocess}


def here(name, task, watch):
    """Run a way in this process."""
    return Run(RUNNERS[name](task, lambda: None), 0.25, [0.5, 0.75], 10.0, 20.0 if watch else 0.0)


@TASKS
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_ends_with_the_same_adapter(task, way):
    rounds = []
    limit = run_loop(task, lambda: None)

    state = way(task, lambda: rounds.append(1))

    check_agreement({"loop": limit, "other": state})
    assert len(rounds) == task.num_rounds
    start = task.build().initial.modules
    moved = max(
        float((state[f"{name}/lora_B"] - factors.lora_B).abs().max())
        for name, factors in start.items()
    )
    assert moved > 1e-3  # it is not the initial adapter that they agree on


@TASKS
def test_a_wrong_result_is_never_timed(task):
    def wrong(name, task, watch):
        run = here(name, task, watch)
        if name != "loop":
            run.state = {key: 1.001 * tensor for key, tensor in run.state.items()}
        assert watch, "timed all the same"
        return run

    with pytest.raises(DisagreementError, match="ours in process leaves a difference"):
        measure(task, list(RUNNERS), 1, wrong)


@pytest.mark.parametrize(
    "change", [lambda s: s | {"x": s["a"]}, lambda s: {"a": s["a"] * torch.nan}]
)
def test_more_tensors_or_nan_are_no_agreement(change):
    right = {"a": torch.ones(2, 3)}

    with pytest.raises(DisagreementError):
        check_agreement({"loop": right, "other": change(right)})


def test_clients_weigh_differently():
    for task in (NOTHING, TRAINING):
        weights = [task.build().num_examples(client) for client in range(task.num_clients)]
        assert len(set(weights)) == len(weights)


def test_the_table_has_a_row_for_every_way_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(simulation, "run_apart", here)

    ((title, rows),) = report({"small": NOTHING}, ["pfl", "ours in process"], list(RUNNERS), 2)

    assert title == "small"
    assert [row["way"] for row in rows] == ["loop", "pfl", "ours in process"]
    assert set(rows[1].values()) == {"pfl", "not installed"}
    assert rows[2]["time / loop"] == "1"
    assert rows[2]["memory, MB"] == "20"


def test_the_overhead_is_what_a_round_takes_above_the_loop_by_client():
    slow, limit = Measurement(rounds=[0.9, 0.5]), Measurement(rounds=[0.4, 0.2])

    assert slow.overhead(limit, 30) == pytest.approx(10.0)


def test_only_what_is_installed_is_run(monkeypatch):
    monkeypatch.setattr(simulation, "has_pfl", lambda: False)

    assert ways(["pfl", "ours in process"]) == ["loop", "ours in process"]


SMALLEST = ("--payloads", "0.04", "--clients", "2", "--rounds", "2", "--repeats", "1")


def test_the_command_measures_every_task(monkeypatch, tmp_path):
    monkeypatch.setattr(simulation, "run_apart", here)
    arguments = ("--harness", "ours in process", "--settings", "dataset.num_train=60")

    done = run_program(
        *("scripts/bench_simulation.py", *SMALLEST, *arguments, "--json", tmp_path / "t.json")
    )

    assert done.returncode == 0, done.stderr
    tables = json.loads((tmp_path / "t.json").read_text())["tables"]
    assert list(tables) == ["nothing, 0.04 MB", "training"]
    assert [row["way"] for row in tables["training"]] == ["loop", "ours in process"]


def test_an_unknown_way_is_one_line():
    done = run_program("scripts/bench_simulation.py", "--harness", "magic")

    assert done.returncode != 0
    assert "expected among loop, pfl" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_in_a_process_of_its_own_it_is_the_same_adapter():
    run = simulation.run_apart("ours in process", TRAINING, False)

    check_agreement({"loop": run_loop(TRAINING, lambda: None), "other": run.state})
    assert len(run.rounds) == TRAINING.num_rounds - 1
    assert (run.imports_mb, run.peak_mb) == (0, 0)  # not watched


@pytest.mark.slow
@pytest.mark.parametrize("way", ["flower, model rebuilt", "ours on Ray"])
def test_on_ray_it_is_the_same_adapter(way):
    run = simulation.run_apart(way, TRAINING, True)

    check_agreement({"loop": run_loop(TRAINING, lambda: None), way: run.state})
    assert len(run.rounds) == TRAINING.num_rounds - 1
    assert run.peak_mb > run.imports_mb > 100
