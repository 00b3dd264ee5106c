"""Starting the node's Ray: what is refused before anything starts, and what belongs to whom."""

import json
import os
import socket
from pathlib import Path

import pytest

from hafl_app.client.warm_worker import ray_runtime
from hafl_app.client.warm_worker.ray_runtime import (
    RayRuntimeError,
    running,
    start,
    state_folder,
    stop,
)

PORT = 6399


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("HAFL_NODE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(ray_runtime, "is_listening", lambda port: False)

    def refuse(*arguments, **options):
        raise AssertionError("nothing may be started")

    monkeypatch.setattr(ray_runtime.subprocess, "Popen", refuse)


def record(temp_dir: Path, pid: int, created: str) -> None:
    folder = state_folder(PORT)
    folder.mkdir(parents=True)
    known = {"pid": pid, "created": created, "temp_dir": str(temp_dir)}
    (folder / "ray.json").write_text(json.dumps(known))


def test_a_temporary_folder_with_other_files_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_runtime, "_LONGEST_TEMP_DIR", 200)
    (tmp_path / "thesis.tex").write_text("")

    with pytest.raises(RayRuntimeError, match="is not empty"):
        start(PORT, temp_dir=tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_what_a_ray_left_that_was_killed_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_runtime, "_LONGEST_TEMP_DIR", 200)
    folder = tmp_path / "ray"
    folder.mkdir()
    (folder / "session_1").mkdir()
    record(folder, pid=2**22 + 1, created="1.0")  # above the highest pid

    with pytest.raises(AssertionError, match="nothing may be started"):
        start(PORT, temp_dir=folder)
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("path", ["relative", "/tmp/" + "x" * 60])
def test_a_temporary_folder_that_ray_cannot_use_is_refused(path):
    with pytest.raises(RayRuntimeError, match="at most 40 characters"):
        start(PORT, temp_dir=Path(path))


def test_a_link_is_no_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_runtime, "_LONGEST_TEMP_DIR", 200)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(RayRuntimeError, match="is a link"):
        start(PORT, temp_dir=tmp_path / "link")


def test_a_port_that_another_program_has_is_refused(monkeypatch):
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(RayRuntimeError, match=f"port {port} is taken"):
            start(port)


def test_a_process_that_got_the_number_of_a_dead_ray_is_not_stopped(tmp_path):
    record(tmp_path, pid=os.getpid(), created="another boot/1")

    assert running(PORT) is None
    assert not stop(PORT)
    assert tmp_path.exists()
