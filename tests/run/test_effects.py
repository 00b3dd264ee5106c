"""Settings that were typed and change nothing."""

from dataclasses import fields

import pytest

from hafl_app.config.compose import compose
from hafl_app.config.schema import declared_settings
from hafl_app.run.effects import NEEDS, OR, THEN, without_effect
from hafl_app.server.devices import DeviceClass
from hafl_app.strategies.fedrot_lora import FedRotLora
from hafl_app.strategies.haflq import Haflq
from hafl_app.strategies.hetlora import HetLora

KNOWN = {found.name for found in declared_settings()} | {
    f"strategy.{field.name}" for method in (Haflq, HetLora, FedRotLora) for field in fields(method)
}


KNOWN |= {f"devices.classes.*.{field.name}" for field in fields(DeviceClass)}
MIXED = ["devices=mixed"]


def lines(*typed):
    return list(without_effect([compose([*MIXED, *typed])], typed))


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (
            "partition.dirichlet_alpha=0.1",
            "partition.dirichlet_alpha=0.1 has no effect with partition.kind=iid, only with "
            "dirichlet",
        ),
        ("federation.stream_buffer=4", "with federation.streaming=false, only with true"),
        (
            "federation.generate_tokens=4",
            "federation.generate_examples=0 and federation.generate_on_clients=0, only with above",
        ),
        ("federation.generate_seconds=4", "federation.generate_on_clients=0, only with above 0"),
        ("federation.watch_tokens=4", "model.task=classification, only with causal_lm"),
        ("tracking.uri=sqlite:///x.db", "no effect with tracking=jsonl, only with mlflow"),
        ("tracking.project=x", "only with mlflow or trackio or wandb"),
        ("privacy.largest_change=2", "privacy.secure_aggregation=false, only with true"),
        ("privacy.clip_norm=2", "privacy.kind=none, only with central_dp or local_dp"),
        ("compare.baseline=hafl", "only a comparison reads it"),
        ("strategy.server_step=2", "strategy.aggregation=adaptive, only with change"),
        (
            "devices.classes.phone.share=5",
            "has no effect with devices.assign=rank, only with share",
        ),
    ],
)
def test_what_has_no_effect_is_named_with_what_would_give_it_one(typed, line):
    (said,) = lines(typed)
    assert said.startswith(typed)
    assert line in said


CLOSED, HEAD = "model.head=closed_form", "model.closed_form"


@pytest.mark.parametrize(
    ("beside", "typed", "line"),
    [
        ((), f"{HEAD}.ridge=0.1", "model.head=averaged, only with closed_form"),
        ((CLOSED, f"{HEAD}.rule=class_means"), f"{HEAD}.ridge=0.1", "rule=class_means, only with"),
        ((CLOSED, f"{HEAD}.rule=class_means"), f"{HEAD}.ridge_by=gcv", "only with ridge"),
        ((CLOSED, f"{HEAD}.ridge=0.1"), f"{HEAD}.ridge_by=validation", "ridge=0.1, only with null"),
        (
            (CLOSED, f"{HEAD}.temperature=0.1"),
            f"{HEAD}.temperature_by=clients",
            "temperature=0.1, only with null",
        ),
        (
            (CLOSED, "federation.num_rounds=0"),
            f"{HEAD}.trained=true",
            "federation.num_rounds=0, only with above 0",
        ),
        (
            (CLOSED, "federation.num_rounds=3"),
            "model.head_refresh_every=4",
            "federation.num_rounds=3: the head is solved before round 1 alone",
        ),
        (
            (CLOSED, "federation.num_rounds=0"),
            "model.head_refresh_every=1",
            "federation.num_rounds=0: the head is solved before round 1 alone",
        ),
    ],
)
def test_what_a_solved_head_does_not_read_is_named(beside, typed, line):
    (said,) = lines(*beside, typed)
    assert said.startswith(f"{typed} has no effect with ")
    assert line in said


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (
            ["hetlora", "regularizer=false", "tail_weight=1"],
            "strategy.regularizer=false, only with",
        ),
        (["hetlora", "weighting=examples", "norm_of=change"], "weighting=examples, only with norm"),
        (
            ["hetlora", "pruning=false", "regularizer=false", "decay=0.5"],
            "strategy.pruning=false and strategy.regularizer=false, only with true",
        ),
        (["hafl", "selection=random", "importance=adalora"], "selection=random, only with import"),
        (["hafl", "selection=prefix", "scope=model"], "prefix, only with importance or random"),
        (["hafl", "importance=magnitude", "source=server"], "magnitude, only with sensitivity"),
        (["fedara", "importance=sensitivity", "smoothing=0.5"], "sensitivity, only with smoothed"),
        (["fedrot_lora", "rotation_weight=0", "align=A"], "rotation_weight=0.0, only with above 0"),
        (["haflq", "../federation.upload=int8", "path_loss_exponent=3"], "int8, only with mixed"),
    ],
)
def test_settings_of_a_method_that_others_of_its_switch_off_are_named(typed, line):
    method, *others = typed
    overrides = [
        f"strategy={method}",
        *(f"strategy.{o}".replace("strategy.../", "") for o in others),
    ]
    (said,) = lines(*overrides)
    assert said.startswith(overrides[-1])
    assert line in said
    assert not lines(overrides[0], overrides[-1])  # and with the method's own


def test_what_has_an_effect_is_not_named():
    refreshed = ("federation.num_rounds=3", "model.head_refresh_every=3")
    assert not lines(CLOSED, *refreshed, f"{HEAD}.ridge_by=validation", f"{HEAD}.trained=true")
    assert not lines("partition=dirichlet", "partition.dirichlet_alpha=0.1")
    assert not lines("tracking=[tensorboard,wandb]", "tracking.project=x", "tracking.mode=offline")
    assert not lines("federation.generate_examples=2", "federation.generate_tokens=4")
    assert not lines("federation.generate_on_clients=2", "federation.generate_tokens=4")
    assert not lines("strategy.aggregation=change", "strategy.server_step=2")


def test_what_files_set_is_not_named():
    assert not list(without_effect([compose(["partition.dirichlet_alpha=0.1"])], ["seed=1"]))


def test_a_setting_that_is_given_twice_is_named():
    assert lines("seed=1", "seed=2") == ["seed=1 has no effect: seed=2 comes after it"]


def test_what_counts_in_one_job_of_a_sweep_is_not_named():
    alpha = "partition.dirichlet_alpha=0.1"
    jobs = [compose([alpha]), compose([alpha, "partition=dirichlet"])]
    assert not list(without_effect(jobs, ["partition=iid,dirichlet", alpha]))


def test_the_table_names_settings_that_exist():
    needs = [*NEEDS.values(), *(need for others in THEN.values() for need in others)]
    conditions = {name for condition, _ in needs for name in condition.split(OR)}
    assert {*NEEDS, *conditions} <= KNOWN | {"tracking"}
    assert {*THEN} <= {*NEEDS}
