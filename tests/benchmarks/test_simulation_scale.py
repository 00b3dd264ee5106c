from benchmarks.simulation_scale import ASKED, grow, report, task_of
from programs import run_program

SMALL = (
    *("model=tiny_random", "dataset=synthetic", "dataset.num_train=400", "dataset.num_test=20"),
    *("client.batch_size=8", "client.max_steps=1"),
)


def test_it_asks_no_more_clients_than_it_says():
    assert task_of(200, 3).settings.federation.fraction_train == ASKED / 200
    assert task_of(20, 3).settings.federation.fraction_train == 1.0


def test_every_round_is_watched():
    growth = grow(task_of(4, 3))

    assert len(growth.rounds) == len(growth.memory_mb) == 3
    assert min(growth.rounds) > 0


def test_a_row_for_every_number_of_clients_and_a_table_over_time():
    tables = dict(report([3, 60], 2, ()))

    assert [row["registered"] for row in tables["registered clients"]] == [3, 60]
    assert [row["asked in a round"] for row in tables["registered clients"]] == [3, 50]


def test_clients_can_really_train():
    growth = grow(task_of(12, 2, SMALL))

    assert len(growth.rounds) == 2


def test_the_command_prints_and_draws_the_costs(tmp_path):
    picture = tmp_path / "new" / "costs.png"
    sizes = ["--registered", "2", "5", "--rounds", "2"]

    command = ("scripts/bench_simulation.py", "--scale", "--no-training")
    done = run_program(*command, *sizes, "--plot", picture)

    assert done.returncode == 0, done.stderr
    assert "\n| 5 | 5 |" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
