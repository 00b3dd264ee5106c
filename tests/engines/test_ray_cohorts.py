"""Clients that train together on Ray: as many processes as needed, and the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import LONE, TINY, run_tiny
from safetensors.torch import load_file

from hafl_app import server_app
from hafl_app.config.compose import SettingsError, compose
from hafl_app.engines import ray_cohorts
from hafl_app.engines.ray_cohorts import resources_of_cohorts, trainers_for, trains_together

ROOT = Path(__file__).parents[2]
SGD = ("client.optimizer=sgd", "client.learning_rate=0.1", "client.precision=fp32")


def settings(cohort, clients=100):
    return compose([*TINY, f"federation.cohort={cohort}", f"federation.num_clients={clients}"])


@pytest.fixture
def twelve_at_once(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def test_only_a_number_above_one_is_together():
    assert [trains_together(settings(cohort)) for cohort in ("auto", "1", "4")] == [False, False, 1]


def test_one_trainer_for_each_gpu_or_one_on_the_cpu(twelve_at_once):
    assert [trainers_for(settings(4), gpus, None) for gpus in (0, 1, 3)] == [1, 1, 3]


def test_more_than_flower_has_at_once_are_refused(twelve_at_once):
    assert trainers_for(settings(12), 1, None) == 1
    with pytest.raises(SettingsError, match=r"=13: .* has 12 messages at once; expected at most"):
        trainers_for(settings(13), 1, None)
    with pytest.raises(SettingsError, match="6 messages at once for each of 2 GPUs"):
        trainers_for(settings(7), 2, None)
    assert trainers_for(settings(13, clients=5), 1, None) == 1  # no more than these can come


def test_flower_has_no_more_than_32_on_any_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    assert ray_cohorts.flower_messages_at_once() == 32


def test_flower_still_waits_in_threads_of_a_pool_of_the_default_size():
    """From there come the numbers above: see that they are looked up again when Flower changes."""
    source = Path(sys.modules["flwr"].__file__).parent / "server/superlink/fleet/vce/vce_api.py"
    assert "with ThreadPoolExecutor() as executor:" in source.read_text()


def test_a_cluster_is_refused():
    with pytest.raises(SettingsError, match="a Ray of the run's own alone, not on head:6379"):
        trainers_for(settings(4), 1, "head:6379")


def test_as_many_processes_as_clients_come_at_once():
    two_gpus = resources_of_cohorts(settings(4), 2).to_federation_config()
    assert two_gpus == (
        "num-supernodes=100 client-resources-num-cpus=1 client-resources-num-gpus=0.0 "
        "init-args-num-cpus=8"
    )
    few = resources_of_cohorts(settings(4, clients=3), 1)
    assert few.to_federation_config().endswith("init-args-num-cpus=3")


def test_where_nothing_trains_together_the_server_refuses_the_number():
    with pytest.raises(SettingsError, match=r"=4: .* that scripts/simulate.py starts"):
        server_app._check_cohort(settings(4), 0)
    server_app._check_cohort(settings(4), 1)
    server_app._check_cohort(settings("auto"), 0)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_on_ray_is_that_of_one_at_a_time(tmp_path):
    folder = tmp_path / "ray"
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "scripts" / "simulate.py"), *TINY, *SGD, LONE),
            *("federation.cohort=4", f"output_dir={folder}"),
        ],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["cohort"] == {
        "clients": 4,
        "reason": "as the setting says; 4 at once at most",
        "speedup": None,
    }
    # The server and one trainer, however many processes wait.
    assert (folder / "flower.log").read_text().count("loading the base model") == 2

    run_tiny(tmp_path / "alone", *SGD, LONE)
    left, right = (
        load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, tmp_path / "alone")
    )
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.allclose(right[name], rtol=1e-3, atol=1e-4), name
