"""Hostile nodes and hostile runs, asked without any training: who is left out, what is let out."""

import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from hafl_app.client_app import app as client_app
from hafl_app.config.compose import compose
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.run import build
from hafl_app.server.numbering import Numbering
from hafl_app.wire.node_profile import PROFILE

# What a hostile node states of itself; it alone must be left out.
PROFILES: Mapping[str, Mapping[str, Any]] = {
    "profile: control characters": {"device-name": "\x1b[2J\x1b]0;pwned\x07"},
    "profile: forged line": {"device": "cpu\nround 1/1  val 99.9%"},
    "profile: device name of 1 MB": {"device-name": "x" * 10**6},
    "profile: 20,000 rank patterns": {
        "rank-pattern": json.dumps({f"layer{i}": 2 for i in range(20_000)})
    },
    "profile: slow rank patterns": {
        "rank-pattern": json.dumps({f"{i}.*.*.*Q": 2 for i in range(99)})
    },
    "profile: rank pattern without end": {"rank-pattern": json.dumps({"(a+)+b": 2})},
    "profile: broken rank pattern": {"rank-pattern": "{" * 999},
    "profile: rank of a million": {"rank": 10**6},
    "profile: negative examples": {"num-examples": -1},
    "profile: examples beyond all numbers": {"num-examples": 10**13},
    "profile: unknown field": {"admin": True},
    "profile: text for a number": {"memory-free-mb": "much"},
    "profile: numberless with partitions": {
        "own-data": True,
        "partition-id": -1,
        "num-partitions": "x",
    },
    "profile: another node's partition": {"partition-id": 0},
    "profile: 10,001 classes": {"label-names": [str(i) for i in range(10_001)]},
    "profile: class with a line break": {"label-names": ["a\nb"]},
}
_SECRET = "private note"  # in every text of the node that is asked
# What a hostile run wants of a node with a file of its own; it must be refused, without a text.
RUN_CONFIGS: Mapping[str, Sequence[str]] = {
    "run config: another folder": ("dataset=local", "dataset.path=/etc"),
    "run config: a text column as labels": ("dataset=on_device", "dataset.label_column=text"),
    "run config: foreign code": ("dataset=on_device", "model.trust_remote_code=true"),
    "run config: a model of its own": ("dataset=on_device", "model.path=/etc"),
    "run config: no settings at all": ("no.such.setting=1",),
}


@dataclass(frozen=True)
class Attempt:
    """One hostile profile or run config: whether it did no harm, and what was said of it."""

    kind: str
    detected: bool
    reason: str


def hostile_app(node_id: int, profile: Mapping[str, Any]) -> ClientApp:
    """Return an app of which one node states other things of itself than the others."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if context.node_id == node_id and reply.has_content():
            known = dict(reply.content.config_records[PROFILE])
            reply.content[PROFILE] = ConfigRecord({**known, **profile})
        return reply

    return app


def try_profiles(overrides: Sequence[str]) -> list[Attempt]:
    """Let a run of these settings wait for its nodes, the last of them hostile, once a kind."""
    return [_try_profile(kind, profile, overrides) for kind, profile in PROFILES.items()]


def _try_profile(kind: str, profile: Mapping[str, Any], overrides: Sequence[str]) -> Attempt:
    waiting = ("federation.start_timeout_s=1", "federation.min_replies=1")
    settings = compose([*overrides, *waiting])
    num_nodes = settings.federation.num_clients
    config = {"overrides": shlex.join(overrides)}
    directory = build.node_directory(settings, None, Numbering())
    participation = build.strategy(settings).coordinator.participation
    with server_identity():
        grid = InProcessGrid(hostile_app(num_nodes, profile), num_nodes, config)
        accepted = {p.node_id for p in participation.wait_for_nodes(grid, directory)}
    reason = directory.refusals.get(num_nodes, "")
    alone = accepted == set(range(1, num_nodes)) and len(directory.refusals) == 1
    return Attempt(kind, alone and reason.isprintable() and len(reason) <= 300, reason)


def try_run_configs() -> list[Attempt]:
    """Ask a node with a file of its own for its profile, once a hostile run config."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.jsonl"
        rows = [{"text": f"{_SECRET} {i}", "label": "ab"[i % 2]} for i in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        # Without a word of the operator the node allows nothing, whatever this process may.
        node = {"rank": 2, "allowed-paths": "", "allow-remote-code": False}
        own = node | {"data-path": str(path)}
        given = node | {"partition-id": 0, "num-partitions": 1}
        return [
            _try_config(kind, lines, own if "dataset=on_device" in lines else given)
            for kind, lines in RUN_CONFIGS.items()
        ]


def _try_config(kind: str, overrides: Sequence[str], node: Mapping[str, Any]) -> Attempt:
    config = {"overrides": shlex.join(["model=tiny_random", *overrides])}
    with server_identity():
        grid = InProcessGrid(client_app, 1, config, [node])
        query = Message(RecordDict(), 1, MessageType.QUERY)
        reply = next(iter(grid.send_and_receive([query])))
    if reply.has_error():
        reason = reply.error.reason or ""
        return Attempt(kind, bool(reason) and _SECRET not in reason, reason)
    profile = dict(reply.content.config_records[PROFILE])
    return Attempt(kind, False, f"answered; leaks: {_SECRET in str(profile)}")
