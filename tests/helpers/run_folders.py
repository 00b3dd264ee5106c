"""Folders of runs as the app leaves them, written without training."""

import os
import time
from pathlib import Path

import yaml

from hafl_app.run.run_lock import run_lock
from hafl_app.tracking.base import ClientRecord, RoundRecord
from hafl_app.tracking.jsonl import JsonlTracker

RANKS = (2, 4, 8)
NODE_IDS = (1001, 1002, 1003)
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"


def round_record(server_round, accuracy=None, phase="validation", **changes):
    accuracy = 0.1 + 0.2 * server_round if accuracy is None else accuracy
    values = {
        "server_round": server_round,
        "seconds": 2.0,
        "train_loss": 2.0 / (1 + server_round),
        "bytes_down": 3_000_000 * bool(server_round),
        "bytes_up": 1_000_000 * bool(server_round),
        "replies": len(RANKS),
        "failures": 0,
        "metrics": {f"{phase}/accuracy": accuracy},
    }
    return RoundRecord(**values | changes)


def client_record(server_round, client, **changes):
    values = {
        "server_round": server_round,
        "partition_id": client,
        "node_id": NODE_IDS[client],
        "rank": RANKS[client],
        "components_trained": 6 * RANKS[client],
        "num_examples": 50 + client,
        "loss": 2.0 / server_round + 0.1 * client,
        "seconds": 1.0 + client,
        "peak_memory_mb": 700.0,
        "bytes_down": 1_000_000,
        "bytes_up": 300_000 * (client + 1),
    }
    return ClientRecord(**values | changes)


def settings(method="hafl", seed=0, num_rounds=3, **groups):
    return {
        "strategy": {"_target_": f"hafl_app.strategies.{method}.Method"},
        "model": {"name": "minilm"},
        "dataset": {"source": "synthetic"},
        "federation": {"num_rounds": num_rounds, "num_clients": len(RANKS)},
        "seed": seed,
        **groups,
    }


def write_run(folder, *, rounds=3, end="finished", reason="out of luck", **given):
    """Write a run of three clients; `end` None leaves it without one, as a kill does."""
    tracker = JsonlTracker(folder)
    with run_lock(folder):
        tracker.start({}, ())
        for server_round in range(rounds + 1):
            log_round(tracker, server_round)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings(**given)))
        if end == "finished":
            tracker.finish({"model": {"name": "minilm"}, "final": {"test/accuracy": 0.75}})
        elif end:
            tracker.fail(reason, end)
    later = time.time() + 5  # as long as a lock and an end differ at least
    if end:
        os.utime(folder / "summary.json", (later, later))
    return folder


def log_round(tracker, server_round):
    for client in range(len(RANKS)) if server_round else ():
        tracker.log_client(client_record(server_round, client))
    tracker.log_round(round_record(server_round))


def tree(folder: Path):
    """Return what is in a folder, with contents and times."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.stat())
        for path in sorted(folder.rglob("*"))
    }
