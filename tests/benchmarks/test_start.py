"""Starts of runs: what is imported before the first training step, and how it is measured."""

import pytest
from benchmarks.start import first_step, refusal, summary
from running import TINY

NEVER = ("ray", "wandb", "flwr_datasets", "seaborn", "matplotlib", "scipy.stats", "sklearn")


def test_a_run_in_process_reaches_its_first_step_without_what_it_does_not_use():
    start = first_step(list(TINY))

    assert "torch" in start.modules
    assert [name for name in NEVER if name in start.modules] == []
    assert 0 < start.cpu_s < 60
    assert summary([start])["modules"] == f"{len(start.modules):,}"


def test_what_is_not_refused_is_not_timed_as_a_refusal():
    with pytest.raises(RuntimeError, match="--help: not refused"):
        refusal(["--help"])


def test_a_run_without_a_training_step_is_an_error():
    with pytest.raises(RuntimeError, match="no such setting"):
        first_step(["federation.num_round=3"])
