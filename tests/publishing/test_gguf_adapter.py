"""Adapters in GGUF compute by llama.cpp's rules what the adapter does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from publishing_factories import (
    adapter_for,
    bert_base,
    llama_base,
    log_likelihoods,
    save_run,
    spec_of,
)
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from hafl_app.packages import MissingPackageError
from hafl_app.publishing import gguf_adapter
from hafl_app.publishing.export import ExportRequest, export_adapter
from hafl_app.publishing.gguf_adapter import GgufError, read_gguf
from hafl_app.publishing.truncation import truncate_adapter
from hafl_app.training.adapter_files import load_adapter
from hafl_app.training.causal import CausalSpec
from hafl_app.training.settings import BaseSpec

LARGEST = 7
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What llama.cpp calls the layers of a Llama (the table of tensors in its GGUF documentation)."""


def uneven(name: str) -> int:
    """Ranks 2 to 7."""
    return 2 + (len(name) + name.count("d")) % 6


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return llama_base(tmp_path_factory.mktemp("hub") / "llama")


@pytest.fixture(scope="module")
def adapter(base):
    adapter = adapter_for(spec_of("causal", base).build(), uneven)
    assert {factors.rank for factors in adapter.modules.values()} >= {2, LARGEST}
    return adapter


@pytest.fixture
def run(base, adapter, tmp_path) -> Path:
    return save_run(tmp_path / "run", spec_of("causal", base), adapter)


def exported(run: Path, out: Path, **how) -> Path:
    (written, *_) = export_adapter(ExportRequest(run, out, gguf=True, **how))
    return written.folder / "adapter.gguf"


def deltas(file: Path, config) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to each weight, in Transformers' order of rows, from the file alone.

    By Transformers' own reading of GGUF, which undoes what llama.cpp's conversion does.
    """
    reader = GGUFReader(file)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {one.name: one.data for one in reader.tensors}
    processor = LlamaTensorProcessor(config=config.to_dict())
    found = {}
    for number in range(config.num_hidden_layers):
        for ours, theirs in LAYER.items():
            name = f"blk.{number}.{theirs}.weight"
            lora_a, lora_b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
            delta = alpha / lora_b.shape[1] * (lora_b @ lora_a)
            if config.model_type == "llama":
                delta = processor.process(delta, name=name).weights
            found[f"model.layers.{number}.{ours}"] = torch.from_numpy(np.ascontiguousarray(delta))
    assert not tensors
    return found


def assert_same(found, adapter) -> None:
    assert set(found) == set(adapter.modules)
    for name, factors in adapter.modules.items():
        expected = factors.delta_weight()
        assert expected.norm() > 0.1
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


class TestFile:
    def test_has_llama_cpps_layout(self, run, tmp_path):
        reader = GGUFReader(exported(run, tmp_path / "out"))

        fields = {key: field.contents() for key, field in reader.fields.items()}
        assert fields["general.type"] == "adapter"
        assert fields["general.architecture"] == "llama"
        assert fields["adapter.type"] == "lora"
        assert fields["adapter.lora.alpha"] == LARGEST
        tensors = {one.name: one for one in reader.tensors}
        assert len(tensors) == 2 * 2 * len(LAYER)
        assert {one.tensor_type for one in tensors.values()} == {GGMLQuantizationType.F32}
        # ggml's sizes stand the other way round: in_features first.
        assert tuple(tensors["blk.1.ffn_down.weight.lora_a"].shape) == (48, LARGEST)
        assert tuple(tensors["blk.1.ffn_down.weight.lora_b"].shape) == (LARGEST, 32)

    def test_by_llama_cpps_rules_it_is_the_adapter(self, run, base, adapter, tmp_path):
        config = AutoModelForCausalLM.from_pretrained(base).config

        assert_same(deltas(exported(run, tmp_path / "out"), config), adapter)

    def test_a_cut_is_a_file_for_each_rank(self, run, base, adapter, tmp_path):
        written = export_adapter(ExportRequest(run, tmp_path / "out", gguf=True, ranks=[2, 4]))

        config = AutoModelForCausalLM.from_pretrained(base).config
        for one, rank in zip(written, (2, 4), strict=True):
            file = tmp_path / "out" / f"rank-{rank}" / "adapter.gguf"
            assert one.folder == file.parent
            assert_same(deltas(file, config), truncate_adapter(adapter, rank).adapter)

    def test_rows_stay_where_llama_cpp_rotates_as_transformers_does(self, tmp_path):
        config = Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
        spec = CausalSpec(BaseSpec(str(tmp_path / "qwen"), task="causal_lm"))
        adapter = adapter_for(spec.build(), 3)
        file = exported(save_run(tmp_path / "run", spec, adapter), tmp_path / "out")

        assert GGUFReader(file).get_field("general.architecture").contents() == "qwen2"
        assert_same(deltas(file, config), adapter)

    def test_the_card_says_how_to_run_it(self, run, tmp_path):
        card = (exported(run, tmp_path / "out").parent / "README.md").read_text()

        assert "llama-server -m BASE.gguf --lora adapter.gguf" in card
        assert '{"prompt": "{text} another"}' in card
        assert "\n- gguf\n" in card
        assert "PeftModel" not in card


class TestLikelihoods:
    """Computed by hand from the file's tensors, they are those of this project's model."""

    def test_of_a_base_with_files(self, run, base, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        plain = log_likelihoods(model)
        self.add(model, exported(run, tmp_path / "out"))

        own = log_likelihoods(load_adapter(run / "adapter").model.base)
        torch.testing.assert_close(log_likelihoods(model), own, rtol=0, atol=1e-4)
        assert (own - plain).abs().min() > 0.01

    def test_of_random_weights(self, tmp_path):
        spec = CausalSpec(BaseSpec("", task="causal_lm", random_weights=True), seed=5)
        adapter = adapter_for(spec.build(), uneven)
        run = save_run(tmp_path / "run", spec, adapter)
        bare = spec.build()
        bare.load_whole(adapter.map(lambda factors: factors.select(())))
        model = bare.base
        self.add(model, exported(run, tmp_path / "out"))

        own = log_likelihoods(load_adapter(run / "adapter").model.base)
        torch.testing.assert_close(log_likelihoods(model), own, rtol=0, atol=1e-4)

    @staticmethod
    @torch.no_grad()
    def add(model, file) -> None:
        for name, delta in deltas(file, model.config).items():
            layer = model.get_submodule(name)
            getattr(layer, "base_layer", layer).weight += delta


class TestRefusals:
    @pytest.mark.parametrize("kind", ["cls", "mean"])
    def test_a_head(self, kind, tmp_path):
        spec = spec_of(kind, bert_base(tmp_path / "bert"))
        run = save_run(tmp_path / "run", spec, adapter_for(spec.build()))

        self.refused(run, tmp_path, "the adapter's task is classification, with a head")

    def test_an_architecture_without_a_rule(self, tmp_path):
        shape = {"model_type": "gpt_neox", "vocab_size": 64, "hidden_size": 32}
        shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        spec = CausalSpec(BaseSpec("", task="causal_lm", random_weights=True, shape=shape))
        run = save_run(tmp_path / "run", spec, adapter_for(spec.build()))

        self.refused(run, tmp_path, "no rule for the architecture gpt_neox; expected one of llama")

    def test_a_module_that_llama_cpp_has_not(self, run, tmp_path, monkeypatch):
        known = replace(gguf_adapter._ARCHITECTURES["llama"], name="gpt2")
        monkeypatch.setattr(gguf_adapter, "_ARCHITECTURES", {"llama": known})

        self.refused(run, tmp_path, "llama.cpp has no tensor of gpt2 for the module model.layers.0")

    def test_a_base_that_is_cut(self, base, tmp_path):
        spec = spec_of("causal", base, num_layers=1)
        run = save_run(tmp_path / "run", spec, adapter_for(spec.build()))

        self.refused(run, tmp_path, "the base model is cut to 1 layers, and llama.cpp runs all")

    def test_a_missing_package(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr("hafl_app.packages.is_installed", lambda _: False)

        with pytest.raises(MissingPackageError, match="--gguf needs the package gguf: "):
            exported(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("other", ["merge", "vllm"])
    def test_two_forms_at_once(self, run, tmp_path, other):
        with pytest.raises(ValueError, match=r"--\w+ and --\w+: give one of them"):
            exported(run, tmp_path / "out", **{other: True})

    @staticmethod
    def refused(run, tmp_path, reason) -> None:
        with pytest.raises(ValueError, match=f"--gguf: {reason}") as caught:
            exported(run, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


class TestReadingBack:
    def test_rows_in_another_order_leave_nothing(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(gguf_adapter, "_order", lambda *_: slice(None))

        self.refused(run, tmp_path)

    def test_nor_does_another_scaling(self, run, tmp_path, monkeypatch):
        real = GGUFWriter.add_float32
        monkeypatch.setattr(GGUFWriter, "add_float32", lambda s, k, v: real(s, k, v * (1 + 1e-5)))

        self.refused(run, tmp_path)

    @staticmethod
    def refused(run, tmp_path) -> None:
        with pytest.raises(GgufError, match="is another product when read back"):
            exported(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("fields", "tensors", "reason"),
        [
            ({"general.type": "model"}, (), "general.type is not adapter"),
            ({"adapter.type": "control"}, (), "adapter.type is not lora"),
            ({"adapter.lora.alpha": 0.0}, (), "no adapter.lora.alpha above 0"),
            ({}, ("x.weight.lora_a",), "no x.weight.lora_b"),
            ({}, ("x.weight.lora_b",), "unexpected tensor x.weight.lora_b"),
        ],
    )
    def test_a_file_that_llama_cpp_would_refuse(self, tmp_path, fields, tensors, reason):
        file = tmp_path / "it.gguf"
        writer = GGUFWriter(file, "llama")
        given = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 2.0}
        for key, value in (given | fields).items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(key, value)
        for name in tensors:
            writer.add_tensor(name, np.ones((2, 3), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

        with pytest.raises(GgufError, match=reason):
            read_gguf(file)
