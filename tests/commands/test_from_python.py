"""A run from Python."""

import subprocess
import sys

import pytest
from programs import ROOT
from running import TINY

import hafl_app
from hafl_app import load_adapter, simulate


def test_the_package_alone_imports_nothing():
    code = "import sys, hafl_app; print([n for n in sys.modules if n.startswith('hafl_app')], "
    code += "{'torch', 'hydra', 'pandas'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['hafl_app'] set()"


def test_what_is_not_public_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = hafl_app.nope


def test_a_run_gives_scores_history_and_adapter(tmp_path):
    folder = tmp_path / "a run"
    result = simulate(
        *(*TINY, "engine=inprocess", "strategy=flexlora", "federation.num_rounds=1"),
        f"output_dir='{folder}'",
    )
    assert result.folder == folder
    assert list(result.history.index) == [0, 1]
    assert result.history.loc[1, "test/accuracy"] == result.metrics["test/accuracy"]
    assert result.history.loc[1, "bytes_up"] > 0
    assert len(load_adapter(result.adapter).label_names) == 20
    with pytest.raises(ValueError, match="it holds a finished run"):
        simulate(*TINY, "engine=inprocess", f"output_dir='{folder}'")


@pytest.mark.parametrize(
    ("setting", "line"),
    [("rounds=3", "federation.num_rounds"), ("-m", "expected settings alone"), ("seed=1,2", "-m")],
)
def test_a_mistake_is_a_value_error(setting, line):
    with pytest.raises(ValueError, match=line):
        simulate(setting)


def test_what_has_no_effect_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("hafl_app.engines.one_run.run_once", lambda *_: None)
    with pytest.warns(UserWarning, match="has no effect with partition.kind=iid"):
        simulate(*TINY, "partition.dirichlet_alpha=0.1", f"output_dir='{tmp_path / 'new'}'")
