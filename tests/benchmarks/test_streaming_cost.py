import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import streaming
from benchmarks.streaming import check_same, shapes_of
from benchmarks.timing import DisagreementError

from hafl_app.strategies.hafl import Hafl

ROOT = Path(__file__).resolve().parents[2]
# 2 layers of a quarter of TinyLlama's width, rank 16: 0.2 MB a client.
SMALL = ("--layers", "2", "--divide", "4", "--methods", "hafl")


def bench(*arguments: str) -> str:
    command = [sys.executable, "scripts/bench_streaming.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def memory_of(row: str) -> float:
    return float(row.split("MB ")[1].split(",", maxsplit=1)[0])


@pytest.mark.slow
def test_streaming_takes_no_more_memory_for_more_clients():
    out = bench(*SMALL, "--clients", "40", "400", "--at-once", "400")

    few, many, at_once = (memory_of(line) for line in out.splitlines() if line.startswith("method"))
    grown = 360 * sum(s.out_features + s.in_features for s in shapes_of(2, 4).values()) * 16 * 4e-6
    assert many - few < 0.2 * grown
    assert at_once - few > 0.8 * grown


@pytest.mark.parametrize("method", ["hafl", "flexlora"])
def test_both_ways_agree(method):
    check_same(method, shapes_of(1, 32), (4,))


def test_another_result_is_never_measured(monkeypatch):
    finish = Hafl.finish

    def wrong(self, state, previous):
        merged = finish(self, state, previous)
        streamed = self.options.federation.streaming
        return {n: f.scale(1.01) if streamed else f for n, f in merged.items()}

    monkeypatch.setattr(Hafl, "finish", wrong)

    with pytest.raises(DisagreementError, match="another one when streamed"):
        check_same("hafl", streaming.shapes_of(1, 32), (4,))


def test_the_clients_send_numbers_that_differ():
    with streaming.server_identity():
        strategy, grid = streaming._federation("hafl", shapes_of(1, 32), 4, 3, streaming=True)
        before = strategy.global_adapter.tensors()
        streaming.run_rounds(strategy, grid, 1, lambda _: False)
    after = strategy.global_adapter.tensors()
    assert not any(torch.equal(before[name], after[name]) for name in before)
