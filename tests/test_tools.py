"""Programs beside the runs themselves: a user's mistake is one line, never a traceback."""

import pytest
from programs import run_program


@pytest.mark.parametrize(
    ("program", "arguments", "expected"),
    [
        ("scripts/node_worker.py", ["start", "--port", "99999"], "'99999': expected a number from"),
        ("scripts/node_worker.py", ["status", "--port", "6389"], "error: no Ray of this node on"),
        ("hafl_app.deployment.fence", ["--credentials", "/nowhere"], "ca.crt is missing"),
        ("scripts/memory_table.py", ["--measure", "/nowhere"], "model.path=/nowhere: no such"),
        ("scripts/memory_table.py", ["--batch-size", "0"], "'0': expected a whole number from 1"),
        ("scripts/bench_aggregation.py", ["--clients", "5y16"], "'5y16': expected such as 5x16"),
        ("scripts/bench_training.py", ["--cases", "8:9"], "'8:9': expected such as 8, or 64:16"),
        ("scripts/bench_gpu.py", ["--loads", "8:4"], "'8:4': expected such as 8:4x512"),
        ("scripts/bench_server_memory.py", ["--rank", "0"], "--rank: 0: expected at least 1"),
        ("scripts/bench_influence.py", ["--clients", "0"], "--clients: 0: expected at least 1"),
        ("scripts/bench_deploy.py", ["--messages", "0"], "--messages: 0: expected at least 2"),
    ],
)
def test_a_mistake_is_reported_in_one_line(program, arguments, expected):
    done = run_program(program, *arguments)

    assert done.returncode in (1, 2)
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
