import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training_factories import LABELS, SPEC, TINY, assert_same_adapter, random_adapter, random_rows
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

from hafl_app.lowrank.factors import Adapter
from hafl_app.training import adapter_files as saved_module
from hafl_app.training.adapter_card import SavedAdapterError
from hafl_app.training.adapter_files import (
    load_adapter,
    read_adapter,
    save_adapter,
)
from hafl_app.training.causal import CausalSpec, LoraCausalLM
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.evaluate import predict_logits
from hafl_app.training.peft_format import factor_tensors
from hafl_app.training.settings import BaseSpec

NAMES = ("sport", "world", "science")
ROWS = random_rows(12)
IDS = torch.tensor([[5, 9, 2, 7], [3, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ball", "wins", "atom", "treaty"]


@pytest.fixture(scope="module")
def classifier() -> LoraClassifier:
    return LoraClassifier(SPEC)


@pytest.fixture
def adapter(classifier) -> Adapter:
    return random_adapter(classifier, 3)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    """Return a folder as from the hub: a BERT of two layers with its pooler and tokenizer."""
    path = tmp_path_factory.mktemp("base")
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(path)
    vocabulary = path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory, base_folder) -> Path:
    """Return a Llama in which no layer is square, and the tokenizer of the other base."""
    path = tmp_path_factory.mktemp("causal")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(path)
    BertTokenizerFast(vocab=str(base_folder / "vocab.txt")).save_pretrained(path)
    return path


def save(folder: Path, adapter: Adapter, spec: ClassifierSpec = SPEC, **facts) -> Path:
    save_adapter(folder, adapter, spec, label_names=NAMES, max_length=16, facts=facts)
    return folder


def uneven(name: str) -> int:
    return 2 + len(name) % 3


class TestRoundTrip:
    def test_scores_the_same_logits_bit_for_bit(self, classifier, adapter, tmp_path):
        classifier.load_whole(adapter)
        expected = predict_logits(classifier, ROWS)

        loaded = load_adapter(save(tmp_path / "adapter", adapter, rounds=3))

        np.testing.assert_array_equal(predict_logits(loaded.model, ROWS), expected)
        assert not loaded.model.training
        assert loaded.label_names == NAMES
        assert loaded.facts == {"rounds": 3}
        assert len(loaded.tokenize(["word " * 40])[0]) == 16

    def test_another_adapter_scores_others(self, classifier, adapter, tmp_path):
        classifier.load_whole(adapter)

        loaded = load_adapter(save(tmp_path / "adapter", random_adapter(classifier, 3, seed=1)))

        logits = predict_logits(loaded.model, ROWS)
        assert not np.allclose(logits, predict_logits(classifier, ROWS), atol=0.1)

    def test_ranks_may_differ_by_module(self, classifier, tmp_path):
        adapter = random_adapter(classifier, uneven)
        assert len({f.rank for f in adapter.modules.values()}) == 3
        classifier.load_whole(adapter)

        loaded = load_adapter(save(tmp_path / "adapter", adapter))

        np.testing.assert_array_equal(
            predict_logits(loaded.model, ROWS), predict_logits(classifier, ROWS)
        )

    def test_some_target_modules(self, tmp_path):
        spec = ClassifierSpec(TINY, LABELS, ("query", "0.intermediate.dense"), seed=7)
        classifier = LoraClassifier(spec)
        adapter = random_adapter(classifier, 3)
        classifier.load_whole(adapter)

        loaded = load_adapter(save(tmp_path / "adapter", adapter, spec))

        assert set(loaded.model.layers) == set(adapter.modules)
        np.testing.assert_array_equal(
            predict_logits(loaded.model, ROWS), predict_logits(classifier, ROWS)
        )

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_over_a_folder_as_from_the_hub(self, base_folder, tmp_path, pooling):
        spec = ClassifierSpec(BaseSpec(str(base_folder), pooling=pooling), LABELS)
        classifier = LoraClassifier(spec)
        adapter = random_adapter(classifier, 3)
        classifier.load_whole(adapter)

        loaded = load_adapter(save(tmp_path / "adapter", adapter, spec))

        assert loaded.tokenize(["ball wins", "odd"]) == [[2, 5, 6, 3], [2, 1, 3]]
        with torch.no_grad():
            assert torch.equal(loaded.model(IDS, MASK), classifier.eval()(IDS, MASK))

    @pytest.mark.slow
    def test_in_a_fresh_process(self, classifier, adapter, tmp_path):
        classifier.load_whole(adapter)
        save(tmp_path / "adapter", adapter)
        script = """
import sys
import numpy as np
import torch
from hafl_app.training.adapter_files import load_adapter

torch.set_num_threads(1)
with torch.inference_mode():
    ids, mask = torch.from_numpy(np.load(sys.argv[2]))
    np.save(sys.argv[3], load_adapter(sys.argv[1]).model(ids, mask).numpy())
"""
        np.save(tmp_path / "ids.npy", np.stack([IDS, MASK]))
        paths = [str(tmp_path / name) for name in ("adapter", "ids.npy", "logits.npy")]

        subprocess.run(
            [sys.executable, "-c", script, *paths], check=True, cwd=Path(__file__).parents[2]
        )

        with torch.inference_mode():
            expected = classifier.eval()(IDS, MASK).numpy()
        np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)


class TestPlainPeft:
    """The folder needs nothing of this project: these tests score it with PEFT alone."""

    @pytest.mark.parametrize("ranks", [3, uneven])
    def test_mean_pooling_is_a_bare_encoder(self, base_folder, tmp_path, ranks):
        spec = ClassifierSpec(BaseSpec(str(base_folder)), LABELS)
        classifier = LoraClassifier(spec)
        adapter = random_adapter(classifier, ranks)
        folder = save(tmp_path / "adapter", adapter, spec)
        classifier.load_whole(adapter)

        base = AutoModel.from_pretrained(base_folder)
        with torch.no_grad():
            without = base.eval()(IDS, MASK).last_hidden_state
            model = PeftModel.from_pretrained(base, folder).eval()
            hidden = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
            ours = classifier.eval().base(input_ids=IDS, attention_mask=MASK)

        torch.testing.assert_close(hidden, ours.last_hidden_state, rtol=0, atol=1e-5)
        assert (hidden - without).abs().max() > 0.1
        head = load_file(folder / "head.safetensors")
        assert_same_adapter(Adapter({}, head), Adapter({}, adapter.head))

    @pytest.mark.parametrize("ranks", [3, uneven])
    def test_cls_pooling_is_a_whole_classifier(self, base_folder, tmp_path, ranks):
        spec = ClassifierSpec(BaseSpec(str(base_folder), pooling="cls"), LABELS)
        classifier = LoraClassifier(spec)
        adapter = random_adapter(classifier, lambda name: ranks if ranks == 3 else ranks(name))
        folder = save(tmp_path / "adapter", adapter, spec)
        classifier.load_whole(adapter)

        base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=LABELS)
        model = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            logits = model(input_ids=IDS, attention_mask=MASK).logits
            ours = classifier.eval()(IDS, MASK)

        torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5)
        assert not (folder / "head.safetensors").exists()


class TestRefusals:
    @pytest.fixture
    def folder(self, adapter, tmp_path):
        return save(tmp_path / "adapter", adapter)

    @pytest.mark.parametrize("file", ["hafl.json", "adapter_model.safetensors", "head.safetensors"])
    def test_a_missing_file(self, folder, file):
        (folder / file).unlink()

        with pytest.raises(SavedAdapterError, match=f"{folder}: not a saved adapter: .*{file}"):
            load_adapter(folder)

    @pytest.mark.parametrize("file", ["hafl.json", "adapter_model.safetensors", "head.safetensors"])
    def test_a_file_cut_short(self, folder, file):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

        with pytest.raises(SavedAdapterError, match="not a saved adapter"):
            load_adapter(folder)

    @pytest.mark.parametrize(
        "key", ["base", "seed", "target_modules", "label_names", "max_length", "facts"]
    )
    def test_a_card_without_an_entry(self, folder, key):
        card = json.loads((folder / "hafl.json").read_text())
        del card[key]
        (folder / "hafl.json").write_text(json.dumps(card))

        with pytest.raises(SavedAdapterError, match=f"not a saved adapter: '{key}'"):
            load_adapter(folder)

    def test_a_missing_key(self, folder):
        key = "base_model.model.encoder.layer.0.attention.self.query.lora_B.weight"
        rewrite(folder, lambda tensors: tensors.pop(key))

        with pytest.raises(SavedAdapterError, match=f"1 keys do not fit .*, missing: {key}"):
            load_adapter(folder)

    def test_an_unexpected_key(self, folder):
        key = "base_model.model.encoder.layer.7.attention.self.query.lora_B.weight"
        rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(32, 3)}))

        with pytest.raises(SavedAdapterError, match=f"1 keys do not fit .*, unexpected: {key}"):
            load_adapter(folder)

    def test_a_transposed_factor(self, folder):
        key = "base_model.model.encoder.layer.0.attention.self.query.lora_B.weight"
        rewrite(folder, lambda t: t.update({key: t[key].T.contiguous()}))

        with pytest.raises(SavedAdapterError, match=f"{folder}: does not fit the base model"):
            load_adapter(folder)

    @pytest.mark.parametrize(("saved", "asked"), [(1, 2), (2, 1)])
    def test_another_depth(self, tmp_path, saved, asked):
        spec = ClassifierSpec(BaseSpec("", random_weights=True, num_layers=saved), LABELS)
        folder = save(tmp_path / "adapter", random_adapter(LoraClassifier(spec), 3), spec)
        card = json.loads((folder / "hafl.json").read_text())
        card["base"]["num_layers"] = asked
        (folder / "hafl.json").write_text(json.dumps(card))

        # six linear layers of two factors each
        kind = "missing" if asked > saved else "unexpected"
        with pytest.raises(SavedAdapterError, match=f"12 keys do not fit .*, {kind}: .*layer.1"):
            load_adapter(folder)

    def test_another_head(self, folder):
        save_file({"weight": torch.zeros(LABELS, 32)}, folder / "head.safetensors")

        with pytest.raises(SavedAdapterError, match=r"the head has \['weight'\], expected \['bias"):
            load_adapter(folder)

    def test_another_number_of_classes(self, folder):
        card = json.loads((folder / "hafl.json").read_text())
        card["label_names"].pop()
        (folder / "hafl.json").write_text(json.dumps(card))

        with pytest.raises(SavedAdapterError, match="does not fit the base model"):
            load_adapter(folder)


def test_modules_of_one_rank_are_written_from_where_they_lie(adapter):
    rank = max(factors.rank for factors in adapter.modules.values())
    largest = [f for f in adapter.modules.values() if f.rank == rank]

    written = {tensor.data_ptr() for tensor in factor_tensors(adapter).values()}

    assert largest
    assert {f.lora_A.data_ptr() for f in largest} | {
        f.lora_B.data_ptr() for f in largest
    } <= written


class TestInterruptedSave:
    @pytest.fixture
    def breaks(self, monkeypatch):
        def interrupted(*args, **kwargs):
            raise OSError("no space left on device")

        monkeypatch.setattr(saved_module, "write_tensors", interrupted)

    def test_leaves_no_half_folder(self, breaks, adapter, tmp_path):
        with pytest.raises(OSError, match="no space left"):
            save(tmp_path / "adapter", adapter)

        assert list(tmp_path.iterdir()) == []

    def test_leaves_the_old_one(self, adapter, classifier, tmp_path, request):
        folder = save(tmp_path / "adapter", adapter)
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        request.getfixturevalue("breaks")

        with pytest.raises(OSError, match="no space left"):
            save(folder, random_adapter(classifier, 5))

        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert list(tmp_path.iterdir()) == [folder]

    def test_a_whole_one_replaces_the_old(self, adapter, classifier, tmp_path):
        folder = save(tmp_path / "adapter", adapter)
        (folder / "left-over").touch()
        other = random_adapter(classifier, 5)

        save(folder, other)

        classifier.load_whole(other)
        np.testing.assert_array_equal(
            predict_logits(load_adapter(folder).model, ROWS), predict_logits(classifier, ROWS)
        )
        assert not (folder / "left-over").exists()
        assert list(tmp_path.iterdir()) == [folder]


def rewrite(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


class TestCausal:
    """A causal language model's adapter needs nothing of this project."""

    @pytest.mark.parametrize("ranks", [3, uneven], ids=["one rank", "mixed"])
    def test_loads_in_plain_peft_with_the_same_logits(self, causal_folder, tmp_path, ranks):
        spec = CausalSpec(BaseSpec(str(causal_folder), task="causal_lm"))
        model = LoraCausalLM(spec).eval()
        adapter = random_adapter(model, ranks)
        save_adapter(tmp_path / "a", adapter, spec, label_names=("all",), max_length=16)

        base = AutoModelForCausalLM.from_pretrained(causal_folder)
        with torch.no_grad():
            bare = base(input_ids=IDS, attention_mask=MASK).logits
            peft = PeftModel.from_pretrained(base, tmp_path / "a").eval()
            theirs = peft(input_ids=IDS, attention_mask=MASK).logits
            model.load_whole(adapter)
            ours = model(IDS, MASK)
            loaded = load_adapter(tmp_path / "a").model(IDS, MASK)

        real = MASK.bool()
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(bare[real], theirs[real], atol=1e-2)
        assert torch.equal(loaded, ours)
        assert not (tmp_path / "a" / "head.safetensors").exists()
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM"


class TestFilesOfOtherVersions:
    SHAPE: ClassVar = {"model_type": "bert", "hidden_size": 40, "intermediate_size": 56} | {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 512,
    }

    def test_a_shape_is_json_within_json(self, tmp_path):
        base = BaseSpec(random_weights=True, shape=self.SHAPE)
        spec = ClassifierSpec(base, LABELS)
        folder = save(tmp_path / "adapter", random_adapter(LoraClassifier(spec), 3), spec)

        card = json.loads((folder / "hafl.json").read_text())

        assert set(card["base"]) == {
            "path",
            "revision",
            "sha256",
            "package_path",
            "package_sha256",
            "chat_template",
            "num_layers",
            "random_weights",
            "pooling",
            "trust_remote_code",
            "task",
            "shape",
            "quantization",
            "dropout",
        }
        assert json.loads(card["base"]["shape"]) == self.SHAPE
        assert load_adapter(folder).model.layers.keys() == LoraClassifier(spec).layers.keys()
        assert read_adapter(folder).spec.base == base

    def test_keys_of_older_versions_are_read(self, tmp_path, adapter):
        folder = save(tmp_path / "adapter", adapter, SPEC)
        card = json.loads((folder / "hafl.json").read_text())
        for newer in ("trust_remote_code", "task", "shape"):
            del card["base"][newer]
        card["base"]["quantisation"] = card["base"].pop("quantization")
        card["facts"] = {"centralised": True}
        (folder / "hafl.json").write_text(json.dumps(card))

        loaded = load_adapter(folder)

        assert loaded.facts == {"centralized": True}
        assert read_adapter(folder).spec.base.quantization == "none"
