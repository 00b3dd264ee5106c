"""Base models that `conf/model` names: pinned, of the size they say, their layers called so."""

import re

import pytest
import torch
from benchmarks.preset_shapes import CAUSAL, ENCODERS
from omegaconf import OmegaConf

from hafl_app.config.compose import compose
from hafl_app.config.files import CONF
from hafl_app.training.base_model import base_without_weights
from hafl_app.training.settings import BaseSpec
from hafl_app.training.specs import lora_spec
from hafl_app.training.target_modules import resolve_targets

SHAPES = CAUSAL | ENCODERS
FILES = {file.stem: file for file in sorted((CONF / "model").glob("*.yaml"))}
NAMED = {n: f for n, f in FILES.items() if "/" in str(OmegaConf.load(f).get("path", ""))}


def test_all_that_are_named_have_a_shape():
    assert NAMED.keys() - {"minilm"} == SHAPES.keys()


@pytest.mark.parametrize("name", NAMED)
def test_every_one_is_pinned_to_a_commit(name):
    assert re.fullmatch("[0-9a-f]{40}", OmegaConf.load(NAMED[name]).revision)


def test_random_weights_are_in_the_name():
    random = {n for n, f in FILES.items() if OmegaConf.load(f).get("random_weights")}

    assert random
    assert all("random" in name for name in random)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("minilm", ["query", "value"]),
        ("phi4_mini", ["qkv_proj"]),
        ("smollm2", ["q_proj", "v_proj"]),
    ],
)
def test_query_value_follows_the_model(model, expected):
    data = ["dataset=dolly", "dataset.path=x"] if model in SHAPES else []
    settings = compose([f"model={model}", "lora=query_value", *data])

    assert list(settings.lora.target_modules) == expected


@pytest.mark.parametrize("name", SHAPES)
class TestShape:
    @pytest.fixture
    def spec(self, name):
        task = "causal_lm" if name in CAUSAL else "classification"
        return BaseSpec(random_weights=True, shape=SHAPES[name], task=task)

    def test_is_as_large_as_its_file_says(self, name, spec):
        model = base_without_weights(spec, 0)

        said = re.search(r"([\d,.]+) M parameters", NAMED[name].read_text())[1]
        # An encoder's pooler, which nothing reads, is left out.
        pooler = SHAPES[name]["model_type"] in ("bert", "roberta")
        counted = sum(p.numel() for p in model.parameters()) + pooler * (768 * 768 + 768)
        assert f"{counted / 1e6:,.1f}" == said

    def test_its_query_and_value_layers_are_found(self, name, spec):
        settings = OmegaConf.load(NAMED[name])
        endings = list(settings.get("query_value", ["query", "value"]))
        with torch.device("meta"):
            model = base_without_weights(spec, 0)

        found = resolve_targets(model, endings, lora_spec(spec, 0).unadapted(model))

        layers = model.config.num_hidden_layers
        assert len(found) == layers * len(endings)
