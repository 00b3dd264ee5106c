"""Run small federations in this process."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import Message
from flwr.clientapp import ClientApp
from matplotlib.figure import Figure

from hafl_app.client.permissions import own_machine
from hafl_app.client_app import app as client_app
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.lowrank.factors import Adapter
from hafl_app.run import build
from hafl_app.run.federation import run

# Seconds, not minutes: random weights, generated text, one thread.
TINY = (
    "model=tiny_random",
    "dataset=synthetic",
    "dataset.num_train=160",
    "dataset.num_test=40",
    "dataset.max_length=16",
    "federation.num_clients=5",
    "federation.num_rounds=2",
    "client.batch_size=16",
    "federation.server_threads=1",
    "federation.cohort=1",  # a measurement may choose otherwise, and the last bits with it
)

LONE = "federation.alone_clients_per_rank=1"


def instructions(folder: Path, rows: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """Write prompts with answers to a file; return settings of a tiny language model on them."""
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return ("model=tiny_random_causal", "dataset=instructions", f"dataset.path={file}")


def answering(folder: Path) -> tuple[str, ...]:
    """Return settings by which a tiny language model's clients answer prompts."""
    rows = [
        {"instruction": f"what is {i % 7}", "input": "", "output": f"it is {i % 7} of {i % 3}"}
        for i in range(90)
    ]
    return (
        *instructions(folder, rows),
        "dataset.max_length=20",
        "dataset.holdout_fraction=0.3",
        "client.learning_rate=3e-2",
        "federation.generate_on_clients=2",
        "federation.generate_tokens=3",
    )


class ReorderedGrid(InProcessGrid):
    """Replies come in another order than they were asked for."""

    def pull_messages(self, message_ids):
        return list(super().pull_messages(message_ids))[::-1]


def run_tiny(
    folder: Path,
    *overrides: str,
    app: ClientApp = client_app,
    grid_type: type[InProcessGrid] = InProcessGrid,
    draws: bool = False,
    on_round: Callable[[int, Adapter], None] | None = None,
) -> dict[str, Any]:
    """Run a federation; return its summary.

    A drawing of the curves takes a fifth of a run's time; those who look at it ask for it with
    `draws`.
    """
    overrides = (*TINY, *overrides, f"output_dir={folder}")
    run_config = {"overrides": shlex.join(overrides)}
    settings = build.settings_of_run(run_config)
    drawing = nullcontext() if draws else mock.patch.object(Figure, "savefig")
    with server_identity(), own_machine(), drawing:
        grid = grid_type(app, settings.federation.num_clients, run_config)
        run(grid, settings, on_round=on_round)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Read the lines of one kind of a run's metrics.jsonl, without wall-clock and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    volatile = ("seconds", "probe_seconds", "peak_memory_mb")
    return [
        {k: v for k, v in line.items() if k not in volatile}
        for line in lines
        if line["kind"] == kind
    ]


def tampering(change: Callable[[Message, Message], Message]) -> ClientApp:
    """Return a ClientApp whose training replies are changed: `change(request, reply)`."""
    app = ClientApp()
    app.query()(client_app)
    app.evaluate()(client_app)

    @app.train()
    def train(message, context):
        return change(message, client_app(message, context))

    return app
