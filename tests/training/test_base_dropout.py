"""The base model's own dropout: off unless it is asked for, whatever the architecture."""

import pytest
import torch
from torch import nn
from training_factories import TINY
from transformers import AutoConfig, CLIPConfig

from hafl_app.training.base_dropout import switch_off_dropout, without_dropout
from hafl_app.training.base_model import load_base
from hafl_app.training.settings import BaseSpec

SMALL = {
    "bert": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "distilbert": {"dim": 24, "hidden_dim": 40, "n_heads": 2, "n_layers": 1, "dropout": 0.5},
    "deberta-v2": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "gpt2": {"n_embd": 24, "n_head": 2, "n_layer": 1, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5, "num_key_value_heads": 1},
}
WIDTHS = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
CAUSAL = {"gpt2", "llama"}


def base(kind: str, **settings) -> nn.Module:
    task = "causal_lm" if kind in CAUSAL else "classification"
    shape = {"model_type": kind, **WIDTHS, **SMALL[kind]}
    if kind in {"distilbert", "gpt2"}:  # which name their widths otherwise
        shape = {"model_type": kind, "vocab_size": 64, **SMALL[kind]}
    spec = BaseSpec("", random_weights=True, task=task, shape=shape, **settings)
    return load_base(spec, num_labels=3).train()


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """Return what two passes over the same tokens make of them."""
    ids = torch.arange(1, 13).view(2, 6)
    return [model(input_ids=ids)[0] for _ in "ab"]


@pytest.mark.parametrize("kind", SMALL)
def test_nothing_is_dropped_in_training(kind):
    first, second = outputs(base(kind))

    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", SMALL)
def test_the_models_own_dropout_can_be_asked_for(kind):
    model = base(kind, dropout=True)
    first, second = outputs(model)

    assert not torch.equal(first, second)
    assert all(vars(model.config)[k] == v for k, v in SMALL[kind].items() if "drop" in k)


def test_a_classifiers_own_head_drops_nothing_either():
    shape = {"model_type": "bert", **WIDTHS, "classifier_dropout": 0.5}
    spec = BaseSpec("", random_weights=True, pooling="cls", shape=shape)

    first, second = outputs(load_base(spec, num_labels=3).train())

    assert torch.equal(first, second)


def test_rates_of_a_models_parts_are_set_too():
    config = CLIPConfig(
        text_config={"attention_dropout": 0.3}, vision_config={"attention_dropout": 0.2}
    )

    without_dropout(config)

    assert config.text_config.attention_dropout == config.vision_config.attention_dropout == 0.0


def test_what_is_no_rate_stays():
    config = AutoConfig.for_model("bert", hidden_dropout_prob=0.3, keep_dropped=True)
    assert config.classifier_dropout is None

    without_dropout(config)

    assert config.hidden_dropout_prob == 0.0
    assert config.classifier_dropout is None
    assert config.keep_dropped is True
    assert config.layer_norm_eps == 1e-12


def test_a_rate_in_the_models_code_is_switched_off():
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Dropout1d(0.5)).train()

    switch_off_dropout(model)

    x = torch.randn(4, 3)
    assert torch.equal(model(x), model[0](x))


def test_models_with_and_without_are_not_the_same_model():
    assert BaseSpec("", random_weights=True, dropout=True) != TINY
    assert hash(TINY) != hash(BaseSpec("", random_weights=True, dropout=True))
