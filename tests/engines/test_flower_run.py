import os

import pytest

from hafl_app.engines.flower_run import resources_for


@pytest.fixture
def four_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


class TestResources:
    def test_one_cpu_a_thread(self, four_cpus):
        assert resources_for(10, 1, 0).client_cpus == 1
        assert resources_for(10, 2, 0).client_cpus == 2
        assert resources_for(10, 64, 0).client_cpus == 4  # more would never start

    def test_gpus_are_shared_by_those_that_run_at_once(self, four_cpus):
        assert resources_for(10, 1, 1).client_gpus == 0.25
        assert resources_for(2, 1, 1).client_gpus == 0.5
        assert resources_for(10, 1, 8).client_gpus == 1.0
        assert resources_for(10, 1, 0).client_gpus == 0.0

    def test_given_shares_win(self, four_cpus):
        resources = resources_for(10, 1, 1, client_cpus=3, client_gpus=0.1)
        assert resources.to_federation_config() == (
            "num-supernodes=10 client-resources-num-cpus=3 client-resources-num-gpus=0.1"
        )
