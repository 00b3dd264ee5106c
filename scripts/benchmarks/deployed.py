"""A ServerApp that times its messages to two nodes in turn, one with a warm worker, one without.

`scripts/bench_deploy.py` runs it in the place of the app's own; both nodes train the same plan on
the same data.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from hafl_app.config.schema import Settings
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import (
    CONFIG,
    METRICS,
    PLAN,
    SERVER_ROUND,
    AdapterArrays,
    adapter_content,
    plan_record,
)

NODES = {1: "in process", 2: "worker"}
"""Ways in which a node answers, by the nodes' rank budgets."""
RESULTS = "bench.json"
_RANK = 8
_POLL_SECONDS = 0.1
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Send each node ``federation.num_rounds`` trainings, by turns; write the figures."""
    settings = build.settings_of_run(context.run_config)
    while len(node_ids := list(grid.get_node_ids())) < len(NODES):
        time.sleep(_POLL_SECONDS)
    rows, ways = [], {}
    for node_id in node_ids:
        reply, seconds = _timed(grid, Message(RecordDict(), node_id, MessageType.QUERY))
        profile = NodeProfile.from_reply(reply)
        ways[node_id] = NODES[profile.rank]
        rows.append({"way": ways[node_id], "kind": "query", "beyond": seconds})
    for _ in range(settings.federation.num_rounds):
        for node_id in node_ids:
            reply, seconds = _timed(grid, Message(_content(settings), node_id, MessageType.TRAIN))
            rows.append({"way": ways[node_id], "kind": "train"} | _figures(reply, seconds))
    (Path(str(settings.output_dir)) / RESULTS).write_text(json.dumps(rows))


def _timed(grid: Grid, message: Message) -> tuple[Message, float]:
    started = time.perf_counter()
    ids = list(grid.push_messages([message]))
    # Flower's own loop looks every three seconds.
    while not (replies := list(grid.pull_messages(ids))):
        time.sleep(_POLL_SECONDS)
    return replies[0], time.perf_counter() - started


def _figures(reply: Message, seconds: float) -> dict[str, Any]:
    trained = float(reply.content.metric_records[METRICS]["seconds"])  # type: ignore[arg-type]
    digest = hashlib.sha256()
    for name, record in sorted(reply.content.array_records.items()):
        for key, array in sorted(record.items()):
            digest.update(f"{name}/{key}".encode() + array.data)
    return {"training": trained, "beyond": seconds - trained, "sha256": digest.hexdigest()}


def _content(settings: Settings) -> RecordDict:
    num_labels = len(build.federated_text(settings, 1).label_names)
    shapes = adapter_shapes(build.model_spec(settings, num_labels))
    rng = np.random.default_rng(settings.seed)
    modules = {
        name: (
            rng.normal(size=(_RANK, shape.in_features)).astype(np.float32),
            np.zeros((shape.out_features, _RANK), np.float32),
        )
        for name, shape in shapes.items()
    }
    every = tuple(range(_RANK))
    plan = TrainPlan(
        {name: ModulePlan(every, every) for name in shapes}, max_steps=settings.client.max_steps
    )
    records = {PLAN: plan_record(plan), CONFIG: ConfigRecord({SERVER_ROUND: 1})}
    return adapter_content(AdapterArrays(modules), **records)
