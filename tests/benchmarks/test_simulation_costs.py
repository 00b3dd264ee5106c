import pytest
from benchmarks.simulation_costs import REST, STEPS, Stopwatch, report
from benchmarks.simulation_task import SimulationTask


def burn(seconds):
    import time

    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_step_inside_another_counts_for_itself_alone():
    watch = Stopwatch()
    inner = watch.timed("inner", lambda: burn(0.02))

    def outer():
        burn(0.01)
        inner()

    watch.lap()
    watch.timed("outer", outer)()
    seconds = watch.lap()

    assert 0.02 <= seconds["inner"] < 0.028
    assert 0.01 <= seconds["outer"] < 0.018
    assert not watch.lap().get("inner")


def test_every_step_of_a_clients_round_is_seen():
    ((name, rows),) = report({"small": SimulationTask(3, 3, 20_000)})

    assert name == "small"
    medians = {row["step"]: float(row["ms per client"].split()[0]) for row in rows}
    together = medians.pop("together")
    assert set(medians) == {step for step, _, _ in STEPS} | {REST}
    assert all(value > 0 for value in medians.values())
    assert sum(medians.values()) == pytest.approx(together, rel=0.2)
