"""Old names: refused on the command line, read as the new ones in what runs have written."""

import pytest

from hafl_app.config.compose import CONF, SettingsError, compose
from hafl_app.config.schema import declared_settings
from hafl_app.renames import (
    CHOICES,
    FACTS,
    MODULES,
    SETTINGS,
    renamed_overrides,
    renamed_settings,
    renamed_target,
)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.quantisation=int8"], "model.quantisation is now model.quantization"),
        (["+model.quantisation=int8"], "model.quantisation is now model.quantization"),
        (["~model.quantisation"], "model.quantisation is now model.quantization"),
        (
            ["strategy=hetlora", "strategy.regulariser=false"],
            "strategy.regulariser is now strategy.regularizer",
        ),
        (
            ["strategy=hetlora", "+strategy.regulariser=false"],
            "strategy.regulariser is now strategy.regularizer",
        ),
        (
            ["strategy._target_=hafl_app.strategies.averaging.ComponentAveraging"],
            "strategy._target_: hafl_app.strategies.averaging.ComponentAveraging is now "
            "hafl_app.strategies.component_mean.ComponentAveraging",
        ),
        (["tracking.kind=wandb"], "tracking.kind is now tracking"),
        (["model=llama_1b"], "model=llama_1b is now model=llama_1b_random"),
        (["model=vit_digits"], "model=vit_digits is now model=vit_digits_random"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(overrides, line):
    with pytest.raises(SettingsError) as caught:
        compose(overrides)
    assert str(caught.value) == line


def test_the_new_names_exist_and_the_old_ones_do_not():
    declared = {found.name for found in declared_settings()}
    strategy = compose(["strategy=hetlora"]).strategy
    declared |= {f"strategy.{name}" for name in strategy.__dataclass_fields__}
    assert set(SETTINGS.values()) <= declared
    assert not set(SETTINGS) & declared
    for module in MODULES.values():
        __import__(module)
    for group, choices in CHOICES.items():
        files = {file.stem for file in (CONF / group).glob("*.yaml")}
        assert set(choices.values()) <= files
        assert not set(choices) & files


def test_saved_settings_are_read_under_todays_names():
    saved = {
        "strategy": {"_target_": "hafl_app.strategies.averaging.Mine", "regulariser": False},
        "model": {"quantisation": "int8", "path": "vit_digits", "name": "vit_digits"},
        "dataset": {"quantisation": 3},
        "seed": 1,
    }
    assert renamed_settings(saved) == {
        "strategy": {"_target_": "hafl_app.strategies.component_mean.Mine", "regularizer": False},
        "model": {"quantization": "int8", "path": "vit_digits", "name": "vit_digits_random"},
        "dataset": {"quantisation": 3},  # no setting that was ever called so
        "seed": 1,
    }


@pytest.mark.parametrize(("kind", "now"), [("wandb", {"wandb": True}), ("jsonl", {}), ("none", {})])
def test_a_saved_kind_of_tracking_is_the_tracker_that_it_named(kind, now):
    saved = {"tracking": {"kind": kind, "project": "mine"}, "privacy": {"kind": "none"}}
    assert renamed_settings(saved) == {
        "tracking": {**now, "project": "mine"},
        "privacy": {"kind": "none"},
    }
    (override,) = renamed_overrides([f"tracking.kind={kind}"])
    assert override == f"tracking={kind}"
    assert str(compose([override]).tracking) == ("wandb" if kind == "wandb" else "jsonl")


def test_saved_overrides_are_read_under_todays_names():
    saved = [
        "+model.quantisation=int8",
        "seed=1",
        "strategy.regulariser='a=b'",
        "~x",
        "model=llama_7b",
    ]
    assert renamed_overrides(saved) == [
        "+model.quantization=int8",
        "seed=1",
        "strategy.regularizer='a=b'",
        "~x",
        "model=llama_7b_random",
    ]


def test_facts_and_targets():
    assert FACTS["quantisation"] == "quantization"
    assert FACTS["centralised"] == "centralized"
    assert renamed_target("hafl_app.strategies.hafl.Hafl") == "hafl_app.strategies.hafl.Hafl"
