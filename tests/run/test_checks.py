"""What goes together, and what a command cannot do with settings."""

import pytest
from refused_settings import CAUSAL, CLOSED, IMAGES, SCAFFOLD, SECURE, tiny_settings

from hafl_app.config.compose import SettingsError
from hafl_app.run.checks import (
    check_base_alone,
    check_centralized,
    check_comparison,
    check_settings,
)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        CAUSAL,
        [IMAGES],
        ["strategy=haflq"],
        ["strategy=zero_padding", "privacy=central_dp"],
        ["privacy=local_dp"],
        SECURE,
        ["privacy=secure_aggregation", "strategy=hafl", "strategy.selection=prefix"],
        ["privacy=secure_aggregation", "strategy=hetlora", "strategy.pruning=false"],
        ["privacy=secure_aggregation", "strategy=lora_a2"],
        ["privacy=secure_aggregation", "strategy=hafl_plus", "strategy.selection=random"],
        ["federation.unseen_clients=2"],
        [*CAUSAL, "federation.generate_examples=3"],
        [*CAUSAL, "federation.generate_on_clients=3", "federation.central_evaluation=false"],
        [*CAUSAL, "federation.watch_prompts=[hello]"],
        [*CAUSAL, "federation.watch_prompts=[]", "federation.central_evaluation=false"],
        ["federation.watch_prompts=[]"],
        ["federation.streaming=true", "federation.max_norm_ratio=null"],
        ["strategy=hafl", "federation.server_optimizer.kind=yogi"],
        ["federation.server_optimizer.kind=adam", "federation.server_optimizer.tau=0.1"],
        ["strategy=flexlora", "client.proximal=0.1"],
        [*SCAFFOLD, "federation.server_optimizer.kind=momentum"],
        [CLOSED],
        [CLOSED, "federation.num_rounds=0"],
        [CLOSED, "dataset.validation_fraction=0", "model.closed_form.temperature=0.1"],
        [CLOSED, "dataset.validation_fraction=0", "model.closed_form.temperature_by=clients"],
        ["engine=inprocess"],
        ["federation.ray_address='head:6379'"],
    ],
    ids=str,
)
def test_what_goes_together_passes(overrides):
    check_settings(tiny_settings(*overrides))


@pytest.mark.parametrize(
    ("overrides", "searches", "line"),
    [
        (["model.head=local"], False, "model.head=local: there is no global model to compare"),
        (
            ["dataset.validation_fraction=0"],
            True,
            "dataset.validation_fraction=0: nothing to tune on; add tune=false",
        ),
    ],
)
def test_what_cannot_be_compared(overrides, searches, line):
    with pytest.raises(SettingsError) as caught:
        check_comparison(tiny_settings(*overrides), searches)
    assert str(caught.value) == line
    check_comparison(
        tiny_settings(*(o for o in overrides if "head" not in o)), searches_rates=False
    )


def test_what_cannot_be_centralized():
    with pytest.raises(SettingsError, match="centralized training learns its head by gradients"):
        check_centralized(tiny_settings(CLOSED))
    check_centralized(tiny_settings())


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model=tiny_random"],
            "adapter=none: only a model.task=causal_lm can be scored alone, the head of a "
            "classification model is trained with its adapter",
        ),
        (
            [*CAUSAL, "model.quantization=blockwise"],
            "model.quantization=blockwise: that is each client's own choice; expected none, int8 "
            "or nf4",
        ),
    ],
)
def test_what_cannot_be_scored_alone(overrides, line):
    with pytest.raises(SettingsError) as caught:
        check_base_alone(tiny_settings(*overrides))
    assert str(caught.value) == line
    check_base_alone(tiny_settings(*CAUSAL))
