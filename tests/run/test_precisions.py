"""The precision of server and nodes: in the summary, and the same when a run resumes."""

from dataclasses import replace

import pytest
import yaml
from running import TINY, run_tiny

from hafl_app.config.compose import CONF, compose
from hafl_app.run.precisions import changed_precision, precisions
from hafl_app.training import device as device_module
from hafl_app.wire.node_profile import NodeProfile

AUTO = compose(TINY)
NODES = [NodeProfile(i, 3, 4, 9, "cpu", precision=p) for i, p in enumerate(("bf16", "fp32", ""))]


def test_a_run_in_bf16_says_so(tmp_path, capsys):
    summary = run_tiny(tmp_path, "client.precision=bf16", "federation.num_rounds=1")

    assert summary["precision"] == "bf16"
    assert {node["precision"] for node in summary["nodes"]} == {"bf16"}
    assert "cpu, bf16, " in capsys.readouterr().out
    assert summary["status"] == "finished"


def test_auto_is_written_as_what_was_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(device_module, "_multiplies_bf16", lambda device: True)

    assert precisions(AUTO, NODES) == {"server": "bf16", "0": "bf16", "1": "fp32"}


@pytest.mark.parametrize(
    ("then", "who"),
    [
        ({"server": "bf16"}, "server computed in bf16"),
        ({"server": "fp32", "1": "bf16"}, "client 1 computed in bf16"),
        ({"server": "fp32", "0": "bf16", "1": "fp32"}, ""),
        ({"2": "bf16", "7": "bf16"}, ""),  # it does not say, or is not there
        ({}, ""),  # the run of an earlier version
    ],
)
def test_what_changed_is_named(then, who):
    line = changed_precision(then, AUTO, NODES)

    assert who in line
    assert bool(line) is bool(who)
    assert line.endswith("; resume with client.precision=bf16" if who else "")


def test_a_named_precision_is_nobodys_choice():
    named = replace(AUTO, client=replace(AUTO.client, precision="bf16"))

    assert changed_precision({"server": "fp32", "0": "fp32"}, named, NODES) == ""


@pytest.mark.parametrize("file", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_comparison_names_its_precision(file):
    experiment = yaml.safe_load(file.read_text())

    if "compare" in experiment:
        assert experiment["client"]["precision"] in {"fp32", "bf16"}
