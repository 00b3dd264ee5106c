"""No command of ours, and none that the documentation gives, reports to Flower's makers."""

import re
from pathlib import Path

import pytest

from hafl_app.client.warm_worker.ray_runtime import connection_environment
from hafl_app.engines.processes import run_environment

ROOT = Path(__file__).parents[1]
OFF = "FLWR_TELEMETRY_ENABLED"
FILES = [
    *("scripts/deploy_local.sh", "scripts/container.sh", "scripts/demo.sh", "scripts/test.sh"),
    *("compose.yaml", "Dockerfile"),
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_starts_flower_switches_it_off(name):
    found = re.findall(rf'{OFF}(?:=|: )(?:\$\{{{OFF}:-)?"?(\w)', (ROOT / name).read_text())
    assert found == ["0"]


def test_runs_and_the_nodes_own_ray_switch_it_off_whatever_the_user_has(monkeypatch, tmp_path):
    monkeypatch.setenv(OFF, "1")
    assert run_environment(tmp_path, "token")[OFF] == "0"
    assert connection_environment(6390)[OFF] == "0"


def test_the_documentation_switches_it_off_wherever_flower_is_started_by_hand():
    blocks = re.findall(
        r"```(?:bash|ini)\n(.*?)```", (ROOT / "docs/deploying.md").read_text(), re.S
    )
    settings = [block for block in blocks if re.search(r"FLWR_HOME=", block)]
    assert len(settings) == 3  # server, device, service
    assert all(f"{OFF}=0" in block for block in settings)
