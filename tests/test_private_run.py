"""Runs under differential privacy, from the settings to the files."""

import json
import shutil
import stat

import pytest
import torch
from running import records, run_tiny
from safetensors.torch import load_file

from hafl_app.privacy.accounting import central_epsilon, local_epsilon
from hafl_app.run.resuming import load_checkpoint
from hafl_app.server.method import StrategyError
from hafl_app.wire.records import METRICS, NUM_EXAMPLES

pytestmark = pytest.mark.slow  # whole federations

CENTRAL = ("strategy=zero_padding", "privacy=central_dp")
LOCAL = ("strategy=flexlora", "privacy=local_dp")


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def epsilons(folder):
    return [r["metrics"]["privacy/epsilon"] for r in records(folder, "round")]


class TestEpsilon:
    def test_is_logged_every_round(self, tmp_path):
        run_tiny(tmp_path / "out", *CENTRAL, "privacy.noise_multiplier=1.5")

        expected = [central_epsilon(1.5, 1.0, r, 1e-5) for r in range(3)]
        assert epsilons(tmp_path / "out") == pytest.approx(expected)

    def test_is_of_the_local_model_where_clients_add_the_noise(self, tmp_path):
        run_tiny(tmp_path / "out", *LOCAL, "privacy.noise_multiplier=3")

        expected = [local_epsilon(3.0, r, 1e-5) for r in range(3)]
        assert epsilons(tmp_path / "out") == pytest.approx(expected)

    def test_ends_the_run_when_it_is_spent(self, tmp_path, caplog):
        budget = central_epsilon(1.0, 1.0, 2, 1e-5) + 0.01

        summary = run_tiny(
            tmp_path / "out", *CENTRAL, "federation.num_rounds=5", f"privacy.max_epsilon={budget}"
        )

        assert summary["rounds"] == 2
        assert "is spent after round 2 of 5" in caplog.text

    def test_that_does_not_suffice_for_a_round_is_refused(self, tmp_path):
        with pytest.raises(StrategyError, match=r"max_epsilon=0.1: the first round would already"):
            run_tiny(tmp_path / "out", *CENTRAL, "privacy.max_epsilon=0.1")

    def test_is_in_the_checkpoint(self, tmp_path):
        run_tiny(tmp_path / "out", *CENTRAL)

        state = load_checkpoint(tmp_path / "out").state
        assert state["epsilon"] == pytest.approx(central_epsilon(1.0, 1.0, 2, 1e-5))

    def test_goes_on_counting_after_a_resume(self, tmp_path):
        folder = tmp_path / "out"
        run_tiny(folder, *CENTRAL, "federation.num_rounds=1")

        run_tiny(folder, *CENTRAL, "federation.num_rounds=3", f"resume={folder}")

        expected = [central_epsilon(1.0, 1.0, r, 1e-5) for r in range(4)]
        assert epsilons(folder) == pytest.approx(expected)


class TestNoise:
    def test_differs_from_run_to_run(self, tmp_path):
        run_tiny(tmp_path / "a", *CENTRAL)
        run_tiny(tmp_path / "b", *CENTRAL)

        one, other = adapter(tmp_path / "a"), adapter(tmp_path / "b")
        assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())

    def test_of_a_round_that_is_computed_again_is_the_same(self, tmp_path):
        """Two different noises on the same sum would average out."""
        run_tiny(tmp_path / "a", *CENTRAL, "federation.num_rounds=1")
        shutil.copytree(tmp_path / "a", tmp_path / "b")

        for name in ("a", "b"):
            folder = tmp_path / name
            run_tiny(folder, *CENTRAL, "federation.num_rounds=2", f"resume={folder}")

        one, other = adapter(tmp_path / "a"), adapter(tmp_path / "b")
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    def test_has_a_key_that_only_its_owner_can_read(self, tmp_path):
        run_tiny(tmp_path / "out", *CENTRAL)

        for path in (tmp_path / "out" / "checkpoints").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for name in ("config.yaml", "metrics.jsonl", "summary.json"):
            assert "noise_key" not in (tmp_path / "out" / name).read_text()


class TestUploads:
    def test_hold_nothing_without_noise_under_local_privacy(self, tmp_path, monkeypatch):
        from hafl_app.client import training_reply

        told, metrics = [], training_reply._metrics

        def spy(*args):
            told.append(dict(metrics(*args).items()))
            return metrics(*args)

        monkeypatch.setattr(training_reply, "_metrics", spy)
        run_tiny(tmp_path / "out", *LOCAL)

        assert told
        assert all(list(m) == [NUM_EXAMPLES] for m in told), METRICS

    def test_losses_are_not_tracked(self, tmp_path):
        run_tiny(tmp_path / "out", *CENTRAL)

        assert [r["train_loss"] for r in records(tmp_path / "out", "round")] == [None] * 3


@pytest.mark.parametrize("method", ["hetlora", "flexlora", "hafl"])
def test_methods_that_cannot_be_private_are_refused_by_name(method, tmp_path):
    with pytest.raises(StrategyError, match=f"strategy={method}: privacy=central_dp"):
        run_tiny(tmp_path / "out", f"strategy={method}", "privacy=central_dp")

    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "failed"
