import os

import psutil
import pytest

from hafl_app.engines import processes
from hafl_app.process_identity import identity, is_alive, start_of


def test_a_process_is_known_by_its_id_and_start():
    known = identity(os.getpid())
    assert is_alive(known)
    assert not is_alive(f"{known}0")
    assert not is_alive(f"{2**22 + 1} {start_of(os.getpid())}")  # above the highest id


@pytest.mark.parametrize("known", ["", "x", "x y", "7"])
def test_what_is_no_identity_is_nobody(known):
    assert not is_alive(known)


def test_a_clock_that_is_set_back_does_not_make_a_process_another(monkeypatch):
    before = identity(os.getpid())
    started = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: started - 3600)
    assert is_alive(before)


def test_a_run_that_is_going_on_is_not_taken_for_abandoned_after_that(monkeypatch, tmp_path):
    environment = processes.run_environment(tmp_path, "token")
    process = processes.start_process(["sleep", "60"], environment, tmp_path / "log")
    try:
        started = psutil.Process().create_time()
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: started - 3600)
        assert not processes.stop_abandoned_run(process.pid)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
