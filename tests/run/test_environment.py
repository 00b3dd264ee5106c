"""Checks of a machine: what each finds, and that a run is refused by those that decide."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from running import TINY

from hafl_app.config.compose import SettingsError, compose
from hafl_app.process_identity import identity
from hafl_app.run import environment
from hafl_app.run.environment import BROKEN, CHECKS, FINE, NOTE, findings, require_environment
from hafl_app.run.preflight import check_first

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def on_ray():
    return compose([*TINY, "engine=ray"])


@pytest.fixture(scope="module")
def inprocess():
    return compose([*TINY, "engine=inprocess"])


class Process:
    def __init__(self, pid, words, **variables):
        self.pid, self._words, self._variables = pid, words, variables

    def cmdline(self):
        return self._words

    def environ(self):
        return self._variables


def no_version(monkeypatch, *names):
    found = importlib.metadata.version

    def version(name):
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(environment.metadata, "version", version)


class TestHere:
    def test_nothing_is_broken_where_the_tests_run(self, inprocess):
        assert [f for f in findings(None) if f.level == BROKEN] == []
        require_environment(inprocess)

    def test_every_finding_is_one_line_with_a_name_of_its_own(self):
        found = list(findings(None))
        assert len({f.name for f in found}) == len(CHECKS)
        assert not any("\n" in str(f) for f in found)


class TestPython:
    @pytest.mark.parametrize(
        ("version", "level"), [((3, 11, 9), FINE), ((3, 12, 0), FINE), ((3, 13, 1), BROKEN)]
    )
    def test_versions(self, monkeypatch, version, level):
        monkeypatch.setattr(environment.sys, "version_info", version)
        assert environment.python(None).level == level


class TestPackages:
    REQUIRED = ("rich>=13", "click>=8.1", 'bitsandbytes>=0.5; extra == "quantized"')

    @pytest.fixture(autouse=True)
    def required(self, monkeypatch):
        monkeypatch.setattr(environment.metadata, "requires", lambda _: list(self.REQUIRED))

    def test_extras_are_not_asked_for(self):
        assert environment.packages(None).text == "all 2 of hafl-app are there"

    def test_a_missing_one_is_broken_with_the_command(self, monkeypatch):
        no_version(monkeypatch, "click")
        found = environment.packages(None)

        assert (found.level, found.text) == (BROKEN, "click not installed")
        assert found.remedy.endswith("click")

    def test_another_version_is_worth_knowing(self, monkeypatch):
        monkeypatch.setattr(environment.metadata, "requires", lambda _: ["rich>=999"])
        found = environment.packages(None)

        assert found.level == NOTE
        assert "(>=999)" in found.text


class TestTorch:
    @pytest.mark.parametrize(
        ("file", "cuda"),
        [
            ("cuda = None\n", ""),
            ("cuda: Optional[str] = None\n", ""),
            ("cuda: Optional[str] = '12.8'\nhip = None\n", "12.8"),
            ("", ""),
        ],
    )
    def test_its_build_is_read_without_importing_it(self, tmp_path, file, cuda):
        path = tmp_path / "version.py"
        path.write_text(file)
        assert environment._cuda_of_torch(path) == cuda

    @pytest.mark.parametrize(
        ("gpus", "cuda", "device", "level", "words"),
        [
            ("", "", "auto", FINE, "for the CPU"),
            ("", "12.8", "auto", FINE, "no GPU"),
            ("H100, 81559 MiB", "12.8", "auto", FINE, "H100"),
            ("H100, 81559 MiB", "", "auto", NOTE, "cannot use"),
            ("H100, 81559 MiB", "", "cuda", BROKEN, "cannot use"),
            ("", "12.8", "cuda", BROKEN, "no CUDA device"),
        ],
    )
    def test_a_gpu_that_it_cannot_use(self, monkeypatch, gpus, cuda, device, level, words):
        monkeypatch.setattr(environment, "_gpus", lambda: gpus)
        monkeypatch.setattr(environment, "_cuda_of_torch", lambda _: cuda)
        settings = compose([*TINY, f"client.device={device}"])
        found = environment.torch(settings)

        assert found.level == level
        assert words in found.text


class TestRayAndFlower:
    def test_without_ray_only_a_run_on_it_is_refused(self, monkeypatch, on_ray, inprocess):
        monkeypatch.setattr(environment, "is_installed", lambda name: name != "ray")

        assert environment.ray(None).level == NOTE
        assert environment.ray(inprocess).level == NOTE
        assert environment.ray(on_ray).level == BROKEN
        with pytest.raises(SettingsError, match="Ray: not installed: engine=inprocess") as caught:
            check_first(on_ray)
        assert "\n" not in str(caught.value)
        check_first(inprocess)

    def test_little_shared_memory_is_worth_knowing(self, monkeypatch):
        monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: Usage(50e6, 0, 50e6))
        found = environment.ray(None)
        assert found.level == (NOTE if Path("/dev/shm").is_dir() else FINE)

    def test_without_flowers_commands(self, monkeypatch, on_ray):
        monkeypatch.setattr(environment, "_has_command", lambda name: name != "flower-superlink")
        found = environment.flower(on_ray)
        assert found.level == BROKEN
        assert "flower-superlink" in found.text

    def test_without_flower(self, monkeypatch):
        no_version(monkeypatch, "flwr")
        assert environment.flower(None).level == BROKEN


class TestSuperlinks:
    SUPERLINK = ("/venv/bin/python", "/venv/bin/flower-superlink", "--insecure")

    def look(self, monkeypatch, *processes):
        monkeypatch.setattr(environment.psutil, "process_iter", lambda: iter(processes))
        return environment.superlinks(None)

    def test_one_whose_run_was_killed_is_stale(self, monkeypatch):
        dead = Process(7, self.SUPERLINK, HAFL_RUN_OWNER="999999999 boot/1")
        found = self.look(monkeypatch, dead, Process(8, ("python", "other.py")))

        assert (found.level, found.remedy) == (NOTE, "kill 7")

    def test_one_whose_run_lives_or_that_is_someones_own_is_at_work(self, monkeypatch):
        own = identity(os.getpid())
        found = self.look(
            monkeypatch,
            Process(7, self.SUPERLINK, HAFL_RUN_OWNER=own),
            Process(9, self.SUPERLINK),
            Process(10, ("grep", "-r", "flower-superlink")),
        )
        assert (found.level, found.text) == (FINE, "at work: process 7, 9")


class TestPorts:
    def test_one_that_is_taken_is_named(self, monkeypatch):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            monkeypatch.setattr(environment, "FLOWER_PORTS", (port,))
            found = environment.ports(None)

        assert found.level == NOTE
        assert str(port) in found.text

    def test_without_a_loopback_only_ray_cannot_work(self, monkeypatch, on_ray):
        def refuse(port):
            raise OSError("not permitted")

        monkeypatch.setattr(environment, "_bind", refuse)
        assert environment.ports(None).level == NOTE
        assert environment.ports(on_ray).level == BROKEN


class TestDisk:
    @pytest.mark.parametrize(("free", "level"), [(10e6, BROKEN), (500e6, NOTE), (50e9, FINE)])
    def test_room(self, monkeypatch, inprocess, free, level):
        monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: Usage(1e12, 0, free))

        assert environment.disk(inprocess).level == level
        if level == BROKEN:
            with pytest.raises(SettingsError, match=r"Disk: .*output_dir=FOLDER"):
                require_environment(inprocess)

    def test_the_folder_need_not_be_there(self, tmp_path):
        settings = compose([*TINY, f"output_dir={tmp_path}/a/b/c"])
        assert str(tmp_path) in environment.disk(settings).text
        assert not list(tmp_path.iterdir())

    def test_one_that_cannot_be_written(self, monkeypatch):
        monkeypatch.setattr(environment.os, "access", lambda *_: False)
        assert environment.disk(None).level == BROKEN


class TestModelHubMemoryCaches:
    def test_a_model_that_is_nowhere_offline(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        settings = compose([*TINY, "model=encoder", "model.path=no-one/nothing"])
        found = environment.base_model(settings)

        assert found.level == BROKEN
        assert "HF_HUB_OFFLINE" in found.text

    def test_one_without_files(self, inprocess):
        assert environment.base_model(inprocess).level == FINE

    def test_a_hub_that_is_out_of_reach_stops_nobody(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")

        def refuse(*_, **__):
            raise OSError

        monkeypatch.setattr(environment.socket, "create_connection", refuse)
        assert environment.hub(None).level == NOTE

    @pytest.mark.parametrize(("free", "level"), [(1e9, NOTE), (8e9, FINE)])
    def test_memory(self, monkeypatch, free, level):
        monkeypatch.setattr(environment, "usable_memory", lambda: (16e9, free))
        assert environment.memory(None).level == level

    def test_a_cache_and_its_size(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HAFL_CACHE", str(tmp_path))
        (tmp_path / "a").write_bytes(b"x" * 3_000_000)
        assert environment.caches(None).text.endswith("(3 MB)")

    def test_optional_packages_have_a_command_each_and_stop_nobody(self, monkeypatch):
        monkeypatch.setattr(environment, "is_installed", lambda name: name == "rouge-score")
        found = environment.optional(None)

        assert found.level == FINE
        assert found.text.startswith("rouge-score installed; not: bitsandbytes (bases in int8")
        assert found.remedy.endswith("bitsandbytes")


def test_quick_and_without_torch():
    code = (
        "import json, sys, time; from hafl_app.commands.main import main; code = main(['doctor']); "
        "heavy = [m for m in ('torch', 'transformers', 'ray', 'pandas') if m in sys.modules]; "
        "print(json.dumps([code, heavy, time.process_time()]))"
    )
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environ
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    code, heavy, seconds = json.loads(last)
    assert (code, heavy) == (0, [])
    assert seconds < 3
    assert lines[-1] == "all that is needed"
