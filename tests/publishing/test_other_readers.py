"""PEFT, vLLM and llama.cpp compute from an adapter's files the update that was federated."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from publishing_factories import adapter_for, llama_base, save_run, spec_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hafl_app.publishing.export import ExportRequest, export_adapter
from hafl_app.publishing.truncation import truncate_adapter
from hafl_app.training.adapter_files import read_adapter

LARGEST = 7


def uneven(name: str) -> int:
    """Ranks 2 to 7: `down_proj` and `gate_proj` differ, which have one input or output."""
    return 2 + (len(name) + name.count("d")) % 6


def tensors_of(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])}
    assert set(tensors) == {name + end for name in names for end in ends}
    return {
        name.removeprefix("base_model.model."): (tensors[name + ends[0]], tensors[name + ends[1]])
        for name in names
    }


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def by_peft(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """PEFT itself."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return {
        name: module.get_delta_weight("default")
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }


def by_vllm(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """vLLM's rule: one scaling, from the config's `r`, `lora_alpha` and `use_rslora` alone."""
    config = config_of(folder)
    assert not config["modules_to_save"]  # it refuses them, and these
    assert not config["use_dora"]
    assert config["bias"] == "none"
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    scaling = config["lora_alpha"] / divisor
    # Its buffers have room for --max-lora-rank, which is compared with the config's r.
    assert all(len(lora_A) <= config["r"] for lora_A, _ in tensors_of(folder).values())
    return {
        name: scaling * lora_B @ lora_A for name, (lora_A, lora_B) in tensors_of(folder).items()
    }


def by_llama_cpp(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """llama.cpp's rule: the config's `lora_alpha` over the rank of each module's own `lora_B`."""
    alpha = config_of(folder)["lora_alpha"]
    return {
        name: alpha / lora_B.shape[1] * lora_B @ lora_A
        for name, (lora_A, lora_B) in tensors_of(folder).items()
    }


READERS = [by_peft, by_vllm, by_llama_cpp]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return llama_base(tmp_path_factory.mktemp("hub") / "llama")


@pytest.fixture(scope="module")
def adapter(base):
    adapter = adapter_for(spec_of("causal", base).build(), uneven)
    ranks = {factors.rank for factors in adapter.modules.values()}
    assert min(ranks) == 2
    assert max(ranks) == LARGEST
    return adapter


@pytest.fixture
def run(base, adapter, tmp_path) -> Path:
    return save_run(tmp_path / "run", spec_of("causal", base), adapter)


def save_with_patterns(folder: Path, adapter) -> None:
    """Write the weights and config of a saved adapter as an earlier version did."""
    ranks = {name: factors.rank for name, factors in adapter.modules.items()}
    config = {**config_of(folder), "rank_pattern": ranks, "alpha_pattern": ranks}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, factors in adapter.modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = factors.lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.lora_B
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    card = json.loads((folder / "hafl.json").read_text())
    del card["ranks"]
    (folder / "hafl.json").write_text(json.dumps(card))


def assert_computed(computed, adapter) -> None:
    assert set(computed) == set(adapter.modules)
    for name, factors in adapter.modules.items():
        expected = factors.delta_weight()
        assert expected.norm() > 0.1
        torch.testing.assert_close(computed[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reader", READERS)
class TestReaders:
    def test_of_a_runs_own_adapter(self, run, base, adapter, reader):
        assert_computed(reader(run / "adapter", base), adapter)

    def test_of_an_export(self, run, base, adapter, tmp_path, reader):
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out"))

        assert_computed(reader(written.folder, base), adapter)
        config = config_of(written.folder)
        assert config["r"] == config["lora_alpha"] == LARGEST
        assert config["rank_pattern"] == config["alpha_pattern"] == {}

    def test_of_a_cut_that_some_modules_are_too_small_for(
        self, run, base, adapter, tmp_path, reader
    ):
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out", ranks=[4]))

        assert_computed(reader(written.folder, base), truncate_adapter(adapter, 4).adapter)
        assert config_of(written.folder)["r"] == 4

    def test_of_an_adapter_that_an_earlier_version_saved(
        self, run, base, adapter, tmp_path, reader
    ):
        save_with_patterns(run / "adapter", adapter)
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out"))

        assert_computed(reader(written.folder, base), adapter)


def test_the_rules_differ_where_ranks_do(run, base, adapter):
    save_with_patterns(run / "adapter", adapter)

    assert_computed(by_peft(run / "adapter", base), adapter)
    too_strong = by_llama_cpp(run / "adapter", base)
    for name, factors in adapter.modules.items():
        factor = LARGEST / factors.rank
        torch.testing.assert_close(too_strong[name], factor * factors.delta_weight())


def test_an_adapter_that_an_earlier_version_saved_is_read(run, adapter):
    save_with_patterns(run / "adapter", adapter)

    read = read_adapter(run / "adapter").adapter

    for name, factors in adapter.modules.items():
        assert torch.equal(read.modules[name].lora_A, factors.lora_A)
        assert torch.equal(read.modules[name].lora_B, factors.lora_B)
