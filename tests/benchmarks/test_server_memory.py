"""The benchmark of a server without its model's weights, on a tiny model."""

import pytest
from benchmarks.server_memory import (
    STRATEGIES,
    WeightsLoadedError,
    check_same,
    measure,
    streaming_strategies,
)
from benchmarks.timing import DisagreementError
from transformers import LlamaConfig

from hafl_app.run.evaluation import CentralEvaluation
from hafl_app.strategies.hafl import Hafl
from hafl_app.training.lora_model import resident_model

TINY = ["model=tiny_random_causal"]


def test_every_strategy_streams_or_says_why_not():
    found = streaming_strategies(TINY, 4)
    assert tuple(found) == STRATEGIES
    assert not any(found.values())
    assert "proximal" in streaming_strategies([*TINY, "client.proximal=-1"], 4)["hafl"]


def test_another_result_is_never_measured(monkeypatch):
    finish = Hafl.finish

    def wrong(self, state, previous):
        merged = finish(self, state, previous)
        streamed = self.options.federation.streaming
        return {n: f.scale(1.01) if streamed else f for n, f in merged.items()}

    check_same("hafl")
    monkeypatch.setattr(Hafl, "finish", wrong)
    with pytest.raises(DisagreementError, match="another one when streamed"):
        check_same("hafl")


def test_a_server_needs_a_configuration_and_no_weights(tmp_path):
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=6,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    folder = ["model=causal", f"model.path={tmp_path}"]

    peak = measure("flexlora", folder, 4, 2)

    assert 0 <= peak.start <= peak.rounds <= peak.end
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_server_that_loads_the_weights_is_found_out(monkeypatch):
    monkeypatch.setattr(CentralEvaluation, "of_rounds", True)
    resident_model.cache_clear()

    with pytest.raises(WeightsLoadedError, match="hafl: the server loads"):
        measure("hafl", TINY, 4, 2)
