"""Messages and contexts for tests of the node, without anything heavy."""

from typing import Any

from flwr.app import Context, Message, RecordDict

from hafl_app.engines.in_process import server_identity


def request(kind: str = "query", content: RecordDict | None = None, run_id: int = 1) -> Message:
    with server_identity(run_id):
        return Message(content or RecordDict(), 7, kind)


def context(node_config: dict[str, Any] | None = None, run_id: int = 1, **rest: Any) -> Context:
    config = {"partition-id": 1, "num-partitions": 3} | (node_config or {})
    return Context(run_id, 7, config, rest.get("state", RecordDict()), rest.get("run_config", {}))
