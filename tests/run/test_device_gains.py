"""The global adapter at the rank of every device, with and without clients that train alone."""

import pytest
import torch
from running import run_tiny

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.metrics import ACCURACY
from hafl_app.run.device_gains import device_gains
from hafl_app.wire.node_profile import NodeProfile


def profiles(*ranks):
    return [NodeProfile(number, len(ranks), rank, 1, "cpu") for number, rank in enumerate(ranks)]


def energy(adapter):
    """Return the squared size of the adapter's product."""
    (factors,) = adapter.modules.values()
    return float((factors.lora_B @ factors.lora_A).square().sum())


def test_a_slice_is_the_best_approximation_not_the_first_components():
    # Components of size 1, 2 and 3: the largest comes last.
    adapter = Adapter({"a": LoraFactors(torch.eye(3, 5), torch.diag(torch.tensor([1.0, 2, 3])))})
    rows = device_gains(adapter, 0.5, [], energy, ACCURACY, profiles(2, 1, 4, 2, 3))
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]  # every budget once
    assert [row["federated"] for row in rows[:2]] == pytest.approx([9, 9 + 4])
    assert [row["federated"] for row in rows[2:]] == [0.5, 0.5]  # nothing is cut: the run's score
    assert all(row.keys() == {"rank", "federated"} for row in rows)


def test_a_run_scores_them_if_asked(tmp_path):
    asked = run_tiny(tmp_path / "asked", "federation.score_device_ranks=true")
    rows = asked["device_ranks"]
    assert [row["rank"] for row in rows] == [2, 4, 8]
    assert rows[-1]["federated"] == asked["final"]["test/accuracy"]
    seconds = asked["cpu_seconds"]
    assert seconds["clients"] > seconds["server"] > 0
    assert seconds["clients"] + seconds["server"] < asked["seconds"] * torch.get_num_threads() + 1
