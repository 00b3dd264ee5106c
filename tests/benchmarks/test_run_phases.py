"""Where the time of a run goes."""

import gc

import pytest
from benchmarks.run_phases import (
    OTHER,
    PHASES,
    START,
    PhaseClock,
    draw,
    measure,
    process_seconds,
    rows,
)
from running import LONE, TINY

from hafl_app.run import federation
from hafl_app.server import rounds

COHORT = "choosing a cohort"


class Ticks:
    """A clock that goes on by what is added to it: CPU seconds, and wall seconds twice as fast."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self):
        return self.now, 2 * self.now

    def work(self, seconds):
        self.now += seconds


def test_a_phase_within_another_one_counts_once():
    ticks = Ticks()
    clock = PhaseClock(ticks, START)
    inner = clock.timed(lambda: ticks.work(3), "inner")

    def work():
        ticks.work(10)
        inner()
        ticks.work(20)
        inner()

    ticks.work(100)
    clock.timed(work, "outer")()
    ticks.work(1000)
    clock.switch(OTHER)
    ticks.work(5)  # not read yet

    assert {phase: (s.cpu, s.wall, s.calls) for phase, s in clock.spent.items()} == {
        START: (1100, 2200, 0),
        "outer": (30, 60, 1),
        "inner": (6, 12, 2),
        OTHER: (0, 0, 0),
    }


def test_a_phase_ends_with_an_error_as_well():
    ticks = Ticks()
    clock = PhaseClock(ticks, START)

    def fail():
        ticks.work(1)
        raise OSError

    with pytest.raises(OSError):
        clock.timed(fail, "broken")()
    ticks.work(7)
    clock.switch(OTHER)

    assert (clock.spent["broken"].cpu, clock.spent[START].cpu) == (1, 7)


def test_clients_that_train_together_are_training_too(tmp_path):
    overrides = ("federation.num_rounds=1", "model.dropout=false", "federation.cohort=5")
    spent = measure((*TINY, *overrides, f"output_dir={tmp_path / 'run'}"))

    assert spent[COHORT].calls == 1
    assert spent["training"].calls == 1


@pytest.fixture
def no_garbage_collection():
    """A full collection takes longer than a tiny run's phases, and falls into any of them."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_every_phase_of_a_run_is_found_and_they_add_up(tmp_path):
    before = vars(federation)["run_rounds"]
    started = process_seconds()
    overrides = (*TINY, LONE, "federation.num_rounds=1", f"output_dir={tmp_path / 'run'}")

    spent = measure(
        overrides, lambda: tuple(b - a for a, b in zip(started, process_seconds(), strict=True))
    )
    took = process_seconds()[0] - started[0]

    assert set(spent) == {*PHASES, START, OTHER} - {COHORT}  # one at a time
    assert all(s.cpu > 0 for s in spent.values())
    assert sum(s.cpu for s in spent.values()) == pytest.approx(took, rel=0.05)
    assert spent["training"].calls == spent["scoring by clients"].calls == 5
    assert spent["lone clients"].calls == spent["aggregation"].calls == 1
    assert spent[OTHER].cpu < 0.2 * took
    # What was wrapped is unwrapped.
    assert vars(federation)["run_rounds"] is before is rounds.run_rounds

    table = rows(spent)
    assert table[-1]["share of CPU"] == "100.0%"
    draw(spent, tmp_path / "phases.png", "A tiny run")
    assert (tmp_path / "phases.png").read_bytes().startswith(b"\x89PNG")
