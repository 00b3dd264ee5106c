"""Run configs of a hostile server: what a node refuses, and that its reasons give nothing away."""

import json
import shlex
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict

from hafl_app.client.permissions import OWN_MACHINE
from hafl_app.client_app import app
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.wire.faults import Fault, fault_of

pytestmark = pytest.mark.slow  # half a second each: composing the settings

SECRET = "hunter2-of-the-environment"
OWN_DATA = ("dataset=on_device", "model=tiny_random", "strategy=zero_padding")
REPOSITORY = str(Path(__file__).parents[2])


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Return a function that asks a node with its own private file for its profile."""
    for name in OWN_MACHINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SECRET", SECRET)
    path = tmp_path / "diary" / "private.jsonl"
    path.parent.mkdir()
    rows = [{"text": f"note {i}", "label": "ab"[i % 2], "name": "Ada Lovelace"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path.parent / "config.json").write_text("{}")

    def ask(*overrides, run_config=None, **node_config):
        given = run_config or {"overrides": shlex.join([*OWN_DATA, *overrides])}
        own = {"rank": 2, "data-path": str(path)}
        own |= {key.replace("_", "-"): value for key, value in node_config.items()}
        with server_identity():
            grid = InProcessGrid(app, 1, given, [own])
            (reply,) = grid.send_and_receive([Message(RecordDict(), 1, MessageType.QUERY)])
        if reply.has_error():
            reason = reply.error.reason
            quoted = (SECRET, "private.jsonl", "Ada", "note ", REPOSITORY, str(path.parent))
            assert not [word for word in quoted if word in reason]
            assert reason.isprintable()
            assert len(reason) <= 300
        return reply

    return ask


def test_an_honest_run_is_answered(ask):
    assert ask().content["profile"]["label-names"] == ["a", "b"]


REFUSED = {
    # Paths
    "a model's folder": (("model=encoder", "model.path=/etc"), Fault.REFUSED, "allowed-paths"),
    "a relative folder": (("model=encoder", "model.path=./conf"), Fault.REFUSED, "absolute"),
    "a home": (("model=encoder", "model.path='~root'"), Fault.REFUSED, "absolute paths only"),
    "an address": (
        ("model=encoder", "model.path=https://user:pw@example.org/x"),
        Fault.BAD_REQUEST,
        "got an address",
    ),
    "a package's folder": (("model.package_path=json/../..",), Fault.REFUSED, "allowed-models"),
    # Hub names and code
    "another model": (("model=encoder", "model.path=x/y"), Fault.REFUSED, "allowed-models"),
    "another revision": (
        ("model=minilm", "model.revision=refs/pr/1"),
        Fault.REFUSED,
        "allowed-models",
    ),
    "a model's own code": (("model.trust_remote_code=true",), Fault.REFUSED, "allow-remote-code"),
    "a template of its own": (
        ("model.chat_template='{{ messages }}'", "dataset.format=chat", "model=tiny_random_causal"),
        Fault.REFUSED,
        "allow-remote-code",
    ),
    "a class": (("strategy._target_=os.system",), Fault.BAD_REQUEST, "expected a class of"),
    "a class that is no method": (
        ("strategy._target_=hafl_app.strategies.base.MetricRecord",),
        Fault.BAD_REQUEST,
        "expected a dataclass",
    ),
    "a module that is not there": (
        ("strategy._target_=hafl_app.strategies.nothing.Nothing",),
        Fault.BAD_REQUEST,
        "cannot be imported",
    ),
    # Columns
    "the texts as labels": (
        ("dataset.label_column=text", "dataset.text_column=label"),
        Fault.REFUSED,
        "a run names no column of this node's file",
    ),
    "names as labels": (("dataset.label_column=name",), Fault.REFUSED, "label-column"),
    "names as texts": (("dataset.text_column=name",), Fault.REFUSED, "text-column"),
    "a column that may exist": (("dataset.label_column=hiv",), Fault.REFUSED, "label-column"),
    "a kind of conversations": (
        ("dataset.format=prompt_completion", "model=tiny_random_causal"),
        Fault.REFUSED,
        "data-format",
    ),
    "a template over its columns": (
        (
            *("dataset.format=chat", "dataset.template='{hiv}'", "dataset.answer_column=name"),
            "model=tiny_random_causal",
        ),
        Fault.BAD_REQUEST,
        "a run names no column of a node's file",
    ),
    # The environment, and files beside conf/
    "the environment": (
        ("dataset.path='${oc.env:SECRET}'",),
        Fault.BAD_REQUEST,
        "only other settings can be named",
    ),
    "the environment in a list": (
        ("dataset.label_names=[a,'${oc.env:SECRET}']",),
        Fault.BAD_REQUEST,
        "only other settings",
    ),
    "the environment by parts": (
        ("seed='${oc.env:${experiment}}'",),
        Fault.BAD_REQUEST,
        "",
    ),
    "a resolver of Hydra's": (("seed='${hydra:runtime.cwd}'",), Fault.BAD_REQUEST, ""),
    "a reference that is not there": (("model.path='${nothing.here}'",), Fault.BAD_REQUEST, ""),
    "a reference to itself": (("model.path='${model.path}'",), Fault.BAD_REQUEST, ""),
    "a file outside of conf": (
        ("model=../../../etc/passwd",),
        Fault.BAD_REQUEST,
        "no such model",
    ),
    "a search path": (("hydra.searchpath=[file:///etc]",), Fault.BAD_REQUEST, "Hydra's own"),
    "another folder for a group": (
        ("+model@dataset=encoder",),
        Fault.BAD_REQUEST,
        "",
    ),
    # Words that are none
    "a setting that is none": (("+secret.path=1",), Fault.BAD_REQUEST, "secret"),
    "a forged line": (("seed='1\nINFO all is well'",), Fault.BAD_REQUEST, ""),
    "a screen control": (("+a\x1b[2J=1",), Fault.BAD_REQUEST, ""),
    "an endless value": (("seed=" + "9" * 100_000,), Fault.BAD_REQUEST, ""),
    "deep brackets": (("dataset.label_names=" + "[" * 300 + "]" * 300,), Fault.BAD_REQUEST, ""),
    "no grammar": (("a=[",), Fault.BAD_REQUEST, ""),
}


@pytest.mark.parametrize(("overrides", "fault", "words"), REFUSED.values(), ids=REFUSED)
def test_is_refused_and_gives_nothing_away(ask, overrides, fault, words):
    reply = ask(*overrides)

    assert reply.has_error()
    assert fault_of(reply) is fault
    assert words in reply.error.reason


@pytest.mark.parametrize(
    "run_config",
    [
        {"overrides": "seed='1"},
        {"overrides": 3.5},
        {"overrides": "dataset=on_device", "model": "../../etc"},
        {"overrides": "dataset=on_device", "seed": "${oc.env:SECRET}"},
        {"overrides": "dataset=on_device", "rounds": "many"},
    ],
    ids=["open quotation", "a number", "a knob's path", "a knob's environment", "a knob's word"],
)
def test_other_parts_of_a_run_config_are_read_as_carefully(ask, run_config):
    assert fault_of(ask(run_config=run_config)) is Fault.BAD_REQUEST


@pytest.mark.parametrize(
    ("node_config", "overrides"),
    [
        ({"least_privacy": "local_dp"}, ()),
        ({"share": "losses"}, ("federation.fraction_evaluate=0",)),
        ({"max_labels": 1}, ()),
        ({"max_label_length": 1, "label_column": "name"}, ()),
        ({"label_column": "text"}, ()),
    ],
    ids=["too little privacy", "withheld classes", "too many", "too long", "a wrong column"],
)
def test_the_operators_terms_hold(ask, node_config, overrides):
    assert fault_of(ask(*overrides, **node_config)) in {Fault.REFUSED, Fault.DATA_UNAVAILABLE}


@pytest.mark.parametrize(
    "node_config",
    [
        {"rank": "/home/ada"},
        {"partition_id": "/home/ada", "num_partitions": 2},
        {"partition_id": 2, "num_partitions": 2},
        {"max_labels": "/home/ada"},
        {"share": "/home/ada"},
        {"least_privacy": "/home/ada"},
        {"allowed_paths": "home/ada"},
        {"bandwidth_kbps": "/home/ada"},
        {"worker": "/home/ada"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_mistake_in_the_nodes_config_is_named_by_its_key_alone(ask, node_config):
    reply = ask(**node_config)

    key = next(iter(node_config)).replace("_", "-")
    assert fault_of(reply) in {Fault.BAD_REQUEST, Fault.WORKER_FAILED}
    assert f"{key} in this node's --node-config: expected" in reply.error.reason
    assert "ada" not in reply.error.reason
