import os

import psutil
import pytest
import torch
from training_factories import CPU

from hafl_app import cgroups
from hafl_app.training import device
from hafl_app.training.device import (
    autocast,
    describe_device,
    device_facts,
    peak_memory_mb,
    reset_peak_memory,
    resolve_device,
    threads,
    usable_memory_mb,
)


def test_auto_takes_cuda_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cpu") == CPU

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(ValueError, match="no CUDA device"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_precision_on_the_cpu(precision, dtype):
    weight = torch.ones(3, 2)

    with autocast(CPU, precision):
        assert (weight @ weight.T).dtype == dtype


def test_threads_are_given_back_even_after_an_error(monkeypatch):
    monkeypatch.setattr(device, "usable_cpus", lambda: 64)
    before = torch.get_num_threads()

    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError

    assert torch.get_num_threads() == before


class TestUsableCpus:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """Cgroups without a quota, for a process in /a/b that may run on eight CPUs."""
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
        monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
        monkeypatch.setattr(cgroups, "_own_group", lambda: "/a/b")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
        return tmp_path

    @pytest.mark.parametrize(
        ("quota", "cpus"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1)]
    )
    def test_a_quota_of_a_group_around_counts(self, root, quota, cpus):
        (root / "a" / "cpu.max").write_text(f"{quota}\n")

        assert cgroups.usable_cpus() == cpus

    def test_no_more_threads_run_and_it_is_said_once(self, root, caplog):
        (root / "a" / "cpu.max").write_text("100000 100000\n")
        device._bounded.cache_clear()

        for _ in range(2):
            with threads(6):
                assert torch.get_num_threads() == 1

        assert [r.getMessage() for r in caplog.records] == [
            "6 threads on 1 usable CPUs would wait for each other"
        ]


def test_the_cpu_knows_its_kind_and_its_memory():
    reset_peak_memory(CPU)  # nothing to reset, and no error

    assert describe_device(CPU) == "cpu"
    # this process has torch loaded: between 50 MB and 1 TB, so the unit is right
    assert 50 < peak_memory_mb(CPU) < 1e6


class TestFacts:
    def test_a_cpu_says_what_it_is(self):
        facts = device_facts(CPU)

        assert facts.kind == "cpu"
        assert facts.name
        assert 0 < facts.memory_free_mb < facts.memory_total_mb
        assert facts.memory_total_mb <= psutil.virtual_memory().total / 1e6
        assert facts.torch_version == torch.__version__

    def test_cuda_says_what_it_is(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7 * 10**9, 24 * 10**9))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * 10**9)
        cuda = torch.device("cuda")

        facts = device_facts(cuda)

        assert (facts.kind, facts.name) == ("cuda", "NVIDIA L4")
        assert (facts.memory_total_mb, facts.memory_free_mb) == (24_000, 7_000)
        # what this process has taken already, it may go on using
        assert usable_memory_mb(cuda) == 9_000

    def test_what_this_process_holds_is_usable(self):
        own = psutil.Process().memory_info().rss / 1e6

        assert usable_memory_mb(CPU) - device_facts(CPU).memory_free_mb == pytest.approx(
            own, rel=0.5
        )


class TestContainers:
    """Control groups, version 2: files in a tree of folders."""

    def limit(self, folder, limit, used=0, reclaimable=0):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {reclaimable}\nslab 7\n")

    def memory(self, monkeypatch, root, own="/"):
        monkeypatch.setattr(cgroups, "_ROOT", root)
        monkeypatch.setattr(cgroups, "_own_group", lambda: own)
        facts = device_facts(CPU)
        return facts.memory_total_mb, facts.memory_free_mb

    def test_its_limit_is_the_memory(self, tmp_path, monkeypatch):
        self.limit(tmp_path, 300 * 10**6, used=120 * 10**6, reclaimable=20 * 10**6)

        assert self.memory(monkeypatch, tmp_path) == (300, 200)

    def test_the_tightest_group_around_counts(self, tmp_path, monkeypatch):
        self.limit(tmp_path / "pod", 200 * 10**6, used=150 * 10**6)
        self.limit(tmp_path / "pod" / "node", 400 * 10**6, used=10 * 10**6)

        assert self.memory(monkeypatch, tmp_path, "/pod/node") == (200, 50)

    def test_a_path_of_the_host_leads_to_the_own_group(self, tmp_path, monkeypatch):
        self.limit(tmp_path, 300 * 10**6)

        assert self.memory(monkeypatch, tmp_path, "/docker/3f2a")[0] == 300

    def test_no_limit_is_the_machine(self, tmp_path, monkeypatch):
        self.limit(tmp_path, "max")

        total, _ = self.memory(monkeypatch, tmp_path)

        assert total == int(psutil.virtual_memory().total / 1e6)

    def test_a_limit_above_the_machine_changes_nothing(self, tmp_path, monkeypatch):
        self.limit(tmp_path, 10**18)

        total, free = self.memory(monkeypatch, tmp_path)

        assert total == int(psutil.virtual_memory().total / 1e6)
        assert free < total

    def test_a_group_above_its_limit_has_nothing_free(self, tmp_path, monkeypatch):
        self.limit(tmp_path, 10 * 10**6, used=12 * 10**6)

        assert self.memory(monkeypatch, tmp_path) == (10, 0)
