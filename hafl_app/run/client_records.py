"""What a run records of its clients: who they are, every reply, their scores and influence."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from hafl_app.metrics import LOSS, Task, spread_of
from hafl_app.server.influence import Influence
from hafl_app.server.round_messages import STATED_EXAMPLES, Reply
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.tracking.base import ClientRecord, ClientRow
from hafl_app.tracking.details import score_record
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import FLOPS


def client_rows(profiles: Iterable[NodeProfile], strategy: HeterogeneousLora) -> list[ClientRow]:
    """Return the clients of a run, with the bytes that the method sends and takes of each."""
    clock = strategy.coordinator.clock
    return [
        ClientRow(
            p.partition_id,
            p.node_id,
            p.rank,
            p.num_examples,
            f"{clock.fleet.name_of(p)} (simulated)" if clock else p.device_line,
            *strategy.payload_bytes(p),
        )
        for p in profiles
    ]


def client_record(reply: Reply) -> ClientRecord:
    """Return what is recorded of one reply to a training request."""
    metrics, profile = reply.metrics, reply.profile
    return ClientRecord(
        server_round=reply.server_round,
        partition_id=profile.partition_id,
        node_id=profile.node_id,
        rank=profile.rank,
        components_trained=reply.num_components,
        num_examples=int(metrics.get("num-examples", 0)),
        loss=metrics.get("loss", math.nan),
        seconds=metrics.get("seconds", math.nan),
        peak_memory_mb=metrics.get("peak-memory-mb", math.nan),
        bytes_down=reply.request.bytes_down,
        bytes_up=reply.bytes_up,
        error=reply.error,
        probe_seconds=metrics.get("probe-seconds", 0.0),
        steps=int(metrics.get("steps", 0)),
        out_of_time=bool(metrics.get("out-of-time", 0)),
        stated_examples=int(metrics.get(STATED_EXAMPLES, 0)),
        flops=metrics.get(FLOPS, math.nan),
        simulated_seconds=reply.simulated_seconds,
    )


def score_records(server_round: int, scored: Iterable[Reply], task: Task) -> list[dict[str, Any]]:
    """Return the scores of a round, each client's by itself."""
    return [
        score_record(
            server_round,
            reply.profile.partition_id,
            reply.profile.rank,
            int(reply.metrics[STATED_EXAMPLES]),
            task.of_clients([reply.metrics], STATED_EXAMPLES),
        )
        for reply in scored
    ]


def spread_of_clients(scored: Iterable[Reply], task: Task) -> dict[str, Any]:
    """Return mean, worst tenth, worst and best of clients' scores, by metric; empty without any."""
    clients = [task.of_clients([reply.metrics], STATED_EXAMPLES) for reply in scored]
    if not clients:
        return {}
    return {"clients": len(clients)} | {
        metric.name: spread_of([one[metric.name] for one in clients], metric)
        for metric in (task.primary, task.second, LOSS)
        if all(metric.name in one for one in clients)
    }


def influence_entries(
    found: Iterable[Influence], profiles: Sequence[NodeProfile]
) -> list[dict[str, float]]:
    """Return the influence of each client in a round, with its rank."""
    ranks = {p.partition_id: p.rank for p in profiles}
    return [
        {
            "partition_id": one.partition_id,
            "rank": ranks.get(one.partition_id, 0),
            "influence": one.share,
            "examples": one.examples,
            "components": one.components,
        }
        for one in found
    ]
