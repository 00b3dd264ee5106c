"""Hostile profiles and run configs of the chaos run: each is rejected, and costs nobody else."""

import pytest
from chaos_suite import strangers
from chaos_suite.strangers import PROFILES, RUN_CONFIGS, try_profiles, try_run_configs

from hafl_app.client.permissions import Permissions
from hafl_app.wire import node_profile

TINY = (
    "experiment=chaos",
    "model=tiny_random",
    "model.num_layers=null",
    "dataset.num_train=60",
    "dataset.num_test=20",
    "federation.num_clients=3",
)


def test_every_hostile_profile_leaves_out_its_node_alone():
    attempts = try_profiles(TINY)

    assert {attempt.kind for attempt in attempts} == set(PROFILES)
    assert [attempt for attempt in attempts if not attempt.detected] == []
    assert all(attempt.reason for attempt in attempts)


def test_every_hostile_run_config_is_refused_without_a_text():
    attempts = try_run_configs()

    assert {attempt.kind for attempt in attempts} == set(RUN_CONFIGS)
    assert [attempt for attempt in attempts if not attempt.detected] == []


class TestWhatIsSwitchedOff:
    """A check that is gone is a problem of the chaos run."""

    def test_of_profiles(self, monkeypatch):
        monkeypatch.setattr(node_profile, "_check_values", lambda profile: None)
        kind = "profile: control characters"
        monkeypatch.setattr(strangers, "PROFILES", {kind: PROFILES[kind]})

        (attempt,) = try_profiles(TINY)

        assert not attempt.detected

    def test_of_permissions(self, monkeypatch):
        monkeypatch.setattr(Permissions, "check", lambda self, settings: None)

        kinds = {attempt.kind for attempt in try_run_configs() if not attempt.detected}

        assert "run config: foreign code" in kinds


@pytest.mark.parametrize("kind", [*PROFILES, *RUN_CONFIGS])
def test_kinds_say_what_is_hostile(kind):
    assert kind.startswith(("profile: ", "run config: "))
