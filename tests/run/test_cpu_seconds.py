"""CPU seconds of clients and server, on a clock that only moves where it is told."""

import pytest

from hafl_app.run import cpu_seconds
from hafl_app.run.cpu_seconds import CpuSeconds


class Clock:
    """A process that computes, and a grid whose clients answer in it."""

    def __init__(self):
        self.now = 100.0
        self.client_cpu_seconds = 7.0  # of what came before the rounds

    def compute(self, seconds, *, client=False):
        self.now += seconds
        self.client_cpu_seconds += seconds if client else 0


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(cpu_seconds.time, "process_time", lambda: made.now)
    return made


def test_the_server_has_what_is_neither_the_clients_nor_apart(clock):
    measured = CpuSeconds(clock)
    with measured.apart():
        clock.compute(50)  # round 0
    with measured.rounds():
        for _ in range(2):
            clock.compute(1)
            clock.compute(10, client=True)
            clock.compute(2)
            with measured.apart():
                clock.compute(30)
    clock.compute(40)
    assert measured.to_json() == {"clients": 20, "server": 6}


def test_of_clients_elsewhere_nothing_is_known(clock):
    measured = CpuSeconds(object())
    with measured.rounds():
        clock.compute(3)
    assert measured.to_json() is None
