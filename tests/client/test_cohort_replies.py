"""Clients of one process that train together: the same replies as one at a time."""

import json
import shlex
from dataclasses import replace

import pytest
from flwr.app import RecordDict
from running import TINY, records, run_tiny
from safetensors.torch import load_file

from hafl_app.client import cohort as client_cohort
from hafl_app.client import handlers
from hafl_app.client.cohort import Cohorts
from hafl_app.client.permissions import own_machine
from hafl_app.client_app import app as client_app
from hafl_app.config.compose import compose
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.training.cohort_choice import CohortChoice

SGD = ("client.optimizer=sgd", "client.learning_rate=0.1", "client.precision=fp32")


@pytest.fixture
def trained(monkeypatch):
    """Note every training: the clients of a cohort, or 1 for one alone."""
    seen = []
    joint, single = client_cohort.train_cohort, handlers.train_locally

    def together(model, tasks):
        seen.append(len(tasks))
        return joint(model, tasks)

    def alone(*arguments, **more):
        seen.append(1)
        return single(*arguments, **more)

    monkeypatch.setattr(client_cohort, "train_cohort", together)
    monkeypatch.setattr(handlers, "train_locally", alone)
    return seen


def run_together(folder, cohort, *overrides, change=None):
    """Run a tiny federation of five clients in cohorts; ``change`` alters its `Cohorts`."""
    overrides = (*SGD, *overrides)

    class Grid(InProcessGrid):
        def __init__(self, app, num_nodes, run_config):
            settings = compose([*TINY, *overrides, "engine=inprocess"])
            federation = replace(settings.federation, cohort=str(cohort))
            cohorts = Cohorts(replace(settings, federation=federation))
            if change:
                change(cohorts)
            super().__init__(app, num_nodes, run_config, cohorts=cohorts)

    return run_tiny(folder, *overrides, app=client_app, grid_type=Grid)


def assert_same_run(one, other):
    # No scores: a class may win by less than rounding.
    for left, right in zip(records(one, "client"), records(other, "client"), strict=True):
        assert_close(left, right)
    left, right = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.allclose(right[name], rtol=1e-3, atol=1e-4), name


def assert_close(left, right):
    """Compare a line of records: words and whole numbers exactly, others nearly."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_close(value, right[key])
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5, nan_ok=True)
    else:
        assert left == right


METHODS = {
    "hafl": ("strategy=hafl",),
    "haflq": ("strategy=haflq",),
    "local heads": ("model.head=local",),
    "streaming": (
        *("federation.streaming=true", "federation.stream_buffer=3"),
        "federation.max_norm_ratio=null",
    ),
}


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_the_run_is_that_of_one_at_a_time(tmp_path, trained, overrides):
    run_tiny(tmp_path / "alone", *SGD, *overrides)
    assert set(trained) == {1}
    trained.clear()

    summary = run_together(tmp_path / "joint", 3, *overrides)

    # Ten clients in all: cohorts of three and of the two that are left, besides the check.
    assert trained == [3, 2, 3, 2]
    assert summary["cohort"]["clients"] == 3
    assert_same_run(tmp_path / "alone", tmp_path / "joint")


def test_a_client_that_fails_is_answered_as_alone(tmp_path, trained, monkeypatch):
    """Its error is the same, and the others are not touched."""
    train_share = client_cohort._task

    def failing(opened):
        if opened.node.partition_id == 2:
            raise RuntimeError("no such row")
        return train_share(opened)

    monkeypatch.setattr(client_cohort, "_task", failing)
    run_together(tmp_path / "joint", 5)
    assert trained == [4, 1, 4, 1]

    monkeypatch.undo()
    run_tiny(tmp_path / "alone", *SGD)
    assert_same_run(tmp_path / "alone", tmp_path / "joint")


def test_a_loss_that_is_not_finite_is_that_clients_error_alone(tmp_path, trained):
    # The step size makes every loss infinite but that of a client with one step.
    overrides = ("client.learning_rate=1e30", "client.max_grad_norm=0", "federation.num_rounds=1")
    for folder, run in (("joint", run_together), ("alone", None)):
        with pytest.raises(Exception, match="round"):
            if run:
                run(tmp_path / folder, 5, *overrides)
            else:
                run_tiny(tmp_path / folder, *SGD, *overrides)
    errors = [[c["error"] for c in records(tmp_path / f, "client")] for f in ("joint", "alone")]
    assert errors[0] == errors[1]
    assert any("loss" in error for error in errors[0])


def test_a_cohort_that_fails_altogether_is_trained_one_at_a_time(tmp_path, monkeypatch):
    def broken(model, tasks):
        raise RuntimeError("a broken kernel")

    monkeypatch.setattr(client_cohort, "train_cohort", broken)
    run_together(tmp_path / "joint", 5)
    run_tiny(tmp_path / "alone", *SGD)
    assert_same_run(tmp_path / "alone", tmp_path / "joint")


def test_two_messages_to_one_node_are_answered_one_after_another(tmp_path, trained):
    class Twice(InProcessGrid):
        def push_messages(self, messages):
            [first, *_] = messages
            again = self.create_message(first.content, "train", first.metadata.dst_node_id, "1")
            return super().push_messages([first, again])

    settings = compose([*TINY, "engine=inprocess", "federation.cohort=5"])
    with server_identity(), own_machine():
        grid = Twice(client_app, 5, {"overrides": shlex.join(TINY)}, cohorts=Cohorts(settings))
        message = grid.create_message(RecordDict(), "train", 1, "1")
        replies = list(grid.send_and_receive([message]))
    assert len(replies) == 2
    assert 5 not in trained


class TestChoice:
    @pytest.mark.parametrize(
        "overrides",
        [
            ("lora.lora_dropout=0.1",),
            ("client.max_seconds=60",),
            ("privacy=local_dp", "strategy=flexlora"),
        ],
    )
    def test_what_stands_against_it_is_named(self, tmp_path, trained, overrides):
        more = ("federation.fraction_evaluate=0", "federation.max_retries=0")
        more = (*more, "federation.num_rounds=1")
        summary = run_together(tmp_path / "run", "auto", *overrides, *more)
        assert set(trained) == {1}
        assert summary["cohort"]["clients"] == 1
        assert summary["cohort"]["reason"].startswith(overrides[0].partition("=")[0])

    def test_a_short_run_is_not_measured(self, tmp_path, trained):
        summary = run_together(tmp_path / "run", "auto", "federation.num_rounds=1")
        assert set(trained) == {1}
        assert "too few to measure" in summary["cohort"]["reason"]

    def test_what_is_measured_is_kept_on_this_machine(self, tmp_path, monkeypatch):
        monkeypatch.setattr(client_cohort, "too_short", lambda *_: "")
        measured = []

        def choose(model, tasks):
            measured.append(len(tasks))
            return CohortChoice(5, "1.5 times as fast together", 1.5)

        monkeypatch.setattr(client_cohort, "choose", choose)
        monkeypatch.setattr(client_cohort, "_folder", lambda: tmp_path / "kept")
        first = run_together(tmp_path / "a", "auto", "federation.num_rounds=1")
        second = run_together(tmp_path / "b", "auto", "federation.num_rounds=1")

        # Another rate is as fast.
        third = run_together(
            *(tmp_path / "c", "auto", "federation.num_rounds=1", "client.learning_rate=0.02")
        )

        assert measured == [5]
        assert third["cohort"] == second["cohort"]
        assert (
            first["cohort"]
            == second["cohort"]
            == {
                "clients": 5,
                "reason": "1.5 times as fast together",
                "speedup": 1.5,
            }
        )

    def test_a_run_that_goes_on_keeps_it_and_its_bits(self, tmp_path, trained, monkeypatch):
        monkeypatch.setattr(client_cohort, "too_short", lambda *_: "")
        monkeypatch.setattr(
            client_cohort, "kept", lambda *_: CohortChoice(2, "1.5 times as fast together", 1.5)
        )
        run_together(tmp_path / "whole", "auto")
        run_together(tmp_path / "cut", "auto", "federation.num_rounds=1")
        # What the machine would say now is something else.
        monkeypatch.setattr(client_cohort, "kept", lambda *_: CohortChoice(5, "now", 2.0))
        trained.clear()
        summary = run_together(tmp_path / "cut", "auto", f"resume={tmp_path / 'cut'}")

        assert trained == [2, 2, 1]
        assert summary["cohort"]["reason"] == "1.5 times as fast together"
        whole, cut = (
            load_file(tmp_path / f / "adapter" / "adapter_model.safetensors")
            for f in ("whole", "cut")
        )
        assert all(whole[name].equal(cut[name]) for name in whole)
        assert json.loads((tmp_path / "cut" / "summary.json").read_text())["cohort"]["clients"] == 2
