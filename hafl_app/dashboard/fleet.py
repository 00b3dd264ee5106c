"""The nodes of a run: who each is, how its trainings went, and when it was last heard."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hafl_app.dashboard.records import number
from hafl_app.dashboard.runs import Run
from hafl_app.tracking.as_text import duration

ONLINE, GONE, SILENT, LEFT, UNKNOWN = "online", "gone", "silent", "left", "unknown"
_FENCE_SILENT_S: Final = 10.0
_RECONNECT_S: Final = 4.0  # in which a node that is well opens its next connection
_SILENT_S: Final = 40.0  # longer than Flower's heartbeat, the least that a node says
_GOOD_BYE: Final = "deactivate-node"


@dataclass
class Node:
    """A row of the fleet.

    Attributes
    ----------
    node_id, name
        Flower's id; as the operator registered it, if that is known.
    state
        `ONLINE`; `GONE`: its connection ended, and it did not come back; `SILENT`: not heard for
        longer than a heartbeat; `LEFT`: it said good-bye; `UNKNOWN`: no fence watches.
    last_seen
        In words; the round of its last reply where no fence watches.
    """

    node_id: int
    name: str = ""
    partition_id: int | None = None
    rank: int | None = None
    device: str = ""
    state: str = UNKNOWN
    last_seen: str = ""
    trainings: int = 0
    failures: int = 0
    last_error: str = ""
    bytes_down: int = 0
    bytes_up: int = 0
    left_out: str = ""
    examples: int | None = None


def fleet(run: Run, watched: Mapping[str, Any], now: float) -> list[Node]:
    """Return the nodes of a run, in partition order, those without a partition last.

    Parameters
    ----------
    watched
        What the fence wrote, see `hafl_app.deployment.presence`; empty without one.
    now
        Seconds since 1970.
    """
    nodes: dict[int, Node] = {}
    for client in _objects(run.clients.get("clients")):
        if (node_id := _whole(client.get("node_id"))) is not None:
            nodes[node_id] = Node(
                node_id,
                partition_id=_whole(client.get("partition_id")),
                rank=_whole(client.get("rank")),
                device=str(client.get("device", "")),
                examples=_whole(client.get("examples")),
            )
    _add_left_out(nodes, run.clients.get("left_out"))
    _add_trainings(nodes, run)
    _add_watched(nodes, watched, now)
    last = max((n.partition_id or 0 for n in nodes.values()), default=0) + 1
    return sorted(nodes.values(), key=lambda n: last if n.partition_id is None else n.partition_id)


def note(watched: Mapping[str, Any], now: float) -> str:
    """Return a line on how well the nodes are watched; empty if all is well."""
    if not watched:
        return ""
    age = now - number(watched.get("written"))
    if age <= _FENCE_SILENT_S:
        return ""
    return f"The fence has not said anything for {_age(age)}: it is not known who is online."


def _add_left_out(nodes: dict[int, Node], left_out: object) -> None:
    for text, reason in left_out.items() if isinstance(left_out, dict) else ():
        if str(text).isdecimal():
            nodes.setdefault(int(text), Node(int(text))).left_out = str(reason)


def _add_trainings(nodes: dict[int, Node], run: Run) -> None:
    for record in run.trainings:
        node = nodes.setdefault(record.node_id, Node(record.node_id))
        if node.partition_id is None:
            node.partition_id, node.rank = record.partition_id, record.rank
        node.trainings += 1
        node.bytes_down += record.bytes_down
        node.bytes_up += record.bytes_up
        if record.error:
            node.failures += 1
            node.last_error = f"round {record.server_round}: {record.error}"
        else:
            node.last_seen = f"reply of round {record.server_round}"


def _add_watched(nodes: dict[int, Node], watched: Mapping[str, Any], now: float) -> None:
    fresh = now - number(watched.get("written")) <= _FENCE_SILENT_S
    for seen in _objects(watched.get("nodes")):
        node_id = _whole(seen.get("node_id"))
        if node_id is None:
            continue
        node = nodes.setdefault(node_id, Node(node_id))
        node.name = str(seen.get("name", ""))
        age = now - number(seen.get("last_call"))
        if not math.isnan(age):  # else it never called
            node.last_seen = f"{_age(age)} ago"
        node.state = _state(seen, now) if fresh else UNKNOWN


def _state(seen: Mapping[str, Any], now: float) -> str:
    last_call, closed = number(seen.get("last_call")), number(seen.get("closed"))
    if math.isnan(last_call):
        return UNKNOWN
    if seen.get("call") == _GOOD_BYE:
        return LEFT
    if seen.get("connected") is False and not math.isnan(closed):
        return GONE if now - max(last_call, closed) > _RECONNECT_S else ONLINE
    return SILENT if now - last_call > _SILENT_S else ONLINE


def _age(seconds: float) -> str:
    return duration(float(round(max(0.0, seconds)))).replace(".0 s", " s")


def _objects(value: object) -> Iterable[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _whole(value: object) -> int | None:
    return value if type(value) is int else None
