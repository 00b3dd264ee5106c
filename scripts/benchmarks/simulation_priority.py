"""The same training in this process and in a Ray actor, for a priority of Ray's workers."""

import os
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from hafl_app.engines.ray_cluster import NICENESS

PRIORITY = "The same training in this process and in one Ray actor"
Times = tuple[float, float]
"""Seconds of one training: by the clock, and of the processor."""


def report(
    overrides: tuple[str, ...], clients: int, pairs: int, levels: Iterable[int] = (15, 0)
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the table: a row for each niceness, measured in a process of its own."""
    rows = []
    for niceness in levels:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            here, actor = process.submit(_pairs, niceness, overrides, clients, pairs).result()
        ratios = [theirs[1] / ours[1] for ours, theirs in zip(here, actor, strict=True)]
        loop, ray = (statistics.median(wall for wall, _ in times) for times in (here, actor))
        rows.append(
            {
                NICENESS: str(niceness),
                "loop, s": f"{loop:.2f}",
                "one actor, s": f"{ray:.2f}",
                "actor / loop": f"{ray / loop:.2f}",
                "CPU time, actor / loop": f"{statistics.median(ratios):.2f}",
            }
        )
    yield PRIORITY, rows


class _Trainer:
    """A client's training, timed."""

    def __init__(self, overrides: tuple[str, ...], clients: int) -> None:
        import torch

        from benchmarks.simulation_task import SimulationTask

        torch.set_num_threads(1)
        self._workload = SimulationTask(clients, 1, 0, overrides).build()

    def train(self, client: int) -> Times:
        from benchmarks.simulation_task import to_state

        state = to_state(self._workload.initial)
        wall, used = time.perf_counter(), time.process_time()
        self._workload.train(state, 1, client)
        return time.perf_counter() - wall, time.process_time() - used


def _pairs(
    niceness: int, overrides: tuple[str, ...], clients: int, pairs: int
) -> tuple[list[Times], list[Times]]:
    os.environ[NICENESS] = str(niceness)
    import ray

    init: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init(num_cpus=1, _node_ip_address="127.0.0.1", **init)
    here = _Trainer(overrides, clients)
    actor: Any = ray.remote(_Trainer).remote(overrides, clients)
    here.train(0), ray.get(actor.train.remote(0))  # loads what is loaded once
    ours, theirs = [], []
    for pair in range(pairs):
        client = pair % clients
        ours.append(here.train(client))
        theirs.append(ray.get(actor.train.remote(client)))
    ray.shutdown()
    return ours, theirs
