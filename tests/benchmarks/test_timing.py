import json

import pytest
from benchmarks.timing import describe, machine, table, time_in_turn, write_json


@pytest.fixture
def clock():
    """A clock that only `advance` moves."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

        def job(self, *seconds, calls=None):
            steps = iter(seconds)

            def run():
                if calls is not None:
                    calls.append(len(calls))
                self.now += next(steps)

            return run

    return Clock()


def test_the_first_call_warms_up_and_is_not_counted(clock):
    timings = time_in_turn({"a": clock.job(9.0, 1.0, 3.0, 2.0)}, 3, clock=clock)

    assert timings["a"].seconds == (1.0, 3.0, 2.0)
    assert timings["a"].median == 2.0
    assert str(timings["a"]) == "2000 (1000-3000)"


def test_jobs_take_turns_and_none_is_always_first():
    order = []
    time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)

    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]


def test_a_job_beyond_patience_is_called_once_and_counts(clock):
    calls = []

    timings = time_in_turn({"slow": clock.job(30.0, calls=calls)}, 3, clock=clock, patience_s=10)

    assert timings["slow"].seconds == (30.0,)
    assert len(calls) == 1


def test_the_machine_is_named():
    where = machine()

    assert where["cores"] >= 1
    assert f"{where['cores']} cores" in describe(where)


def test_a_table_has_a_line_per_row():
    assert table([{"a": 1, "b": "x"}]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_results_replace_the_file_before(tmp_path):
    path = tmp_path / "results.json"

    write_json(path, {"a": 1})
    write_json(path, {"a": 2})

    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
