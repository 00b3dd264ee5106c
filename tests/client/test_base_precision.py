"""A node chooses the bits of its base model's blocks by its own data and its memory."""

import importlib.util
from dataclasses import replace

import pytest
from flwr.app import RecordDict
from running import run_tiny

from hafl_app.client import base_precision as module
from hafl_app.client.base_precision import base_precision
from hafl_app.client.rank_budget import NodeLimits
from hafl_app.config.compose import SettingsError, compose
from hafl_app.run import build
from hafl_app.training.quantization.block_precision import BaseMemoryError
from hafl_app.training.step_memory import StepMemory

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes (extra 'quantized')",
)
# The tiny model's two blocks take 4,896 bytes each in nf4, 10,544 in int8 and 16,000 in bf16.
NF4, INT8, BF16 = 4896, 10544, 16000
# Beside them it has 100,000 bytes of embeddings; training needs 650 MB and 50 MB for each rank.
STEP = StepMemory(
    "cpu", weights=100_000 + 2 * NF4, lowest=18518519, highest=8 * 18518519, max_rank=8
)
OVERRIDES = ["model=tiny_random", "dataset=synthetic", "dataset.num_train=160", "client.device=cpu"]


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setattr(build, "step_memory", lambda settings, num_labels: STEP)
    return compose([*OVERRIDES, "model.quantization=blockwise", "ranks.memory_margin=0"])


@pytest.fixture
def measured(monkeypatch):
    """Return a list that grows with every measurement; the second block is the more salient."""
    calls = []

    def measure(settings, share):
        calls.append(share)
        return [0.1, 0.2]

    monkeypatch.setattr(module, "_saliences", measure)
    return calls


def budgeted(settings, megabytes):
    return replace(settings, model=replace(settings.model, memory_budget_mb=megabytes))


def chosen(settings, limits=None, rank=2, state=None):
    share = build.federated_text(settings, 3).share(0)
    return base_precision(
        settings, limits or NodeLimits(), rank, share, RecordDict() if state is None else state
    )


class TestBudget:
    def test_of_the_settings_is_for_the_base_model(self, settings, measured):
        fewest = 100_000 + 2 * NF4

        assert chosen(budgeted(settings, fewest / 1e6)) == "nf4,nf4"
        assert chosen(budgeted(settings, (fewest + INT8 - NF4) / 1e6)) == "nf4,int8"
        assert chosen(budgeted(settings, (fewest + BF16 - NF4) / 1e6)) == "nf4,bf16"
        assert chosen(budgeted(settings, 1.0)) == "bf16,bf16"

    def test_of_the_node_is_for_all_of_training_at_its_rank(self, settings, measured):
        needed = STEP.needed_mb(3)
        limits = NodeLimits(memory_mb=int(needed) + 1)

        assert chosen(settings, limits, rank=3) == "bf16,bf16"
        with pytest.raises(BaseMemoryError, match="the transformer blocks take"):
            chosen(settings, limits, rank=4)

    def test_of_the_node_goes_first(self, settings, measured):
        with pytest.raises(BaseMemoryError):
            chosen(budgeted(settings, 1.0), NodeLimits(memory_mb=600))

    def test_too_small_for_the_fewest_bits_is_refused(self, settings, measured):
        with pytest.raises(BaseMemoryError, match="in nf4"):
            chosen(budgeted(settings, 0.1))

    def test_none_is_refused(self, settings, measured):
        with pytest.raises(SettingsError, match=r"needs a budget: model\.memory_budget_mb"):
            chosen(settings)


class TestChoice:
    def test_is_kept_for_the_run(self, settings, measured):
        state = RecordDict()
        first = chosen(budgeted(settings, 1.0), state=state)

        assert chosen(budgeted(settings, 1.0), state=state) == first
        assert len(measured) == 1

    def test_another_budget_is_another_choice(self, settings, measured):
        state = RecordDict()
        chosen(budgeted(settings, 1.0), state=state)

        fewest = (100_000 + 2 * NF4) / 1e6
        assert chosen(budgeted(settings, fewest), state=state) == "nf4,nf4"
        assert len(measured) == 2


@pytest.mark.slow
@needs_library
def test_a_federation_trains_on_bases_of_mixed_precision(tmp_path, monkeypatch):
    used = []
    model = build.model

    def spy(settings, num_labels, quantization=None):
        used.append(quantization)
        return model(settings, num_labels, quantization)

    monkeypatch.setattr(build, "model", spy)
    # 142,464 bytes in float32, 93,184 in nf4; see `TestBudget` for the blocks.
    summary = run_tiny(
        tmp_path / "out",
        *("model.quantization=blockwise", "model.memory_budget_mb=0.1", "federation.num_clients=3"),
        "federation.alone_clients_per_rank=0",
    )

    assert summary
    # The server scores on the whole model; a client measures in nf4, and then trains.
    assert {"nf4", None} < set(used)
    assert {"nf4,int8", "int8,nf4"} & set(used)
