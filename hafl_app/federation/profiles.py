"""Node profiles: what each node says it is and can do, and the directory of all nodes."""

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from textwrap import shorten
from typing import TypeVar

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

_LOGGER = logging.getLogger(__name__)
PROFILE = "profile"
_POLL_SECONDS = 0.2
_LEAST = {"partition_id": 0, "num_partitions": 1, "rank": 1, "num_examples": 0}
_REFUSED_SECONDS = 30.0
T = TypeVar("T")
# A node's regular expression runs on the server: names and a few plain repetitions, so that no
# node can write one that takes for ever.
_MOST_REPETITIONS = 3
_HARMLESS = re.compile(r"(?:[\w|-]|\\?\.|\\d\+|\.\*){1,80}")


@dataclass(frozen=True)
class NodeProfile:
    """What a node answers to a query.

    Parameters
    ----------
    partition_id
        Which part of the data it holds, from 0.
    num_partitions
        How many parts there are.
    rank
        Its rank budget for every module that no pattern of `rank_pattern` matches, at least 1.
    num_examples
        Texts it trains on.
    device
        Kind and name of the device it trains on.
    node_id
        Flower's id of the node, set by the server.
    rank_pattern
        Rank budgets of layer types, see `matches`; the first pattern that matches counts.
    """

    partition_id: int
    num_partitions: int
    rank: int
    num_examples: int
    device: str
    node_id: int = 0
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that occurs in its budget."""
        return (self.rank, *self.rank_pattern.values())

    def rank_of(self, module: str) -> int:
        """Return the rank budget of a module."""
        fitting = (rank for p, rank in self.rank_pattern.items() if matches(p, module))
        return next(fitting, self.rank)

    def to_record(self) -> ConfigRecord:
        """Write the profile for the wire."""
        values = asdict(self) | {"rank_pattern": json.dumps(dict(self.rank_pattern))}
        return ConfigRecord({k.replace("_", "-"): v for k, v in values.items() if k != "node_id"})

    @classmethod
    def from_reply(cls, reply: Message) -> "NodeProfile":
        """Read the profile of a query's reply.

        Raises
        ------
        ValueError
            If the reply carries no profile, or one with unreadable rank patterns.
        """
        try:
            values = dict(reply.content.config_records[PROFILE].items())
            known = {k.replace("-", "_"): v for k, v in values.items()}
            pattern = _read_pattern(str(known.pop("rank_pattern", "{}")))
            profile = cls(node_id=reply.metadata.src_node_id, rank_pattern=pattern, **known)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a node profile: {shorten(str(error), 300)}") from error
        _check_values(profile)
        return profile


def _check_values(profile: NodeProfile) -> None:
    for name, least in _LEAST.items():
        value = getattr(profile, name)
        if type(value) is not int or value < least:
            raise ValueError(f"node profile: {name} is {value!r}, expected a number from {least}")
    if profile.partition_id >= profile.num_partitions:
        raise ValueError(
            f"node profile: partition_id is {profile.partition_id}, expected below "
            f"num_partitions, {profile.num_partitions}"
        )
    if not isinstance(profile.device, str):
        raise ValueError(f"node profile: device is {profile.device!r}, expected text")  # noqa: TRY004


def matches(pattern: str, module: str) -> bool:
    r"""Say whether a pattern means a module, as the keys of PEFT's ``rank_pattern`` do.

    It is a regular expression for the whole name or for an end of it that starts after a dot:
    ``output.dense`` means ``layer.0.output.dense`` and ``layer.0.attention.output.dense``, and
    ``layer.\d+.output.dense`` only the first.
    """
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _is_harmless(pattern: str) -> bool:
    repetitions = pattern.count("+") + pattern.count("*")
    return bool(_HARMLESS.fullmatch(pattern)) and repetitions <= _MOST_REPETITIONS


def _read_pattern(text: str) -> dict[str, int]:
    try:
        values: dict[str, int] = json.loads(text)
        odd = [p for p in values if not _is_harmless(p)]
        valid = all(type(rank) is int and rank >= 1 for rank in values.values())
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"rank pattern {text[:80]!r}: {error}") from error
    if odd:
        raise ValueError(f"rank pattern {odd[0][:80]!r}: expected a module's name, with \\d+ or .*")
    if not valid:
        raise ValueError(f"rank pattern {text[:80]!r}: ranks must be whole numbers from 1")
    return values


class NodeDirectory:
    """The nodes of a federation by id: asked once each, when they first appear.

    Parameters
    ----------
    timeout_s
        How long to wait for the answers of one round of questions.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.profiles: dict[int, NodeProfile] = {}
        self.refusals: dict[int, str] = {}  # why nodes cannot take part, until they can

    def in_order(self) -> list[NodeProfile]:
        """Return all profiles in partition order."""
        return sorted(self.profiles.values(), key=lambda p: (p.partition_id, p.node_id))

    def refresh(self, grid: Grid) -> list[NodeProfile]:
        """Query nodes that are new or could not take part, and return those that can.

        They come in partition order, and are connected.
        """
        return self._refresh(grid, ask_again=True)

    def _refresh(self, grid: Grid, ask_again: bool) -> list[NodeProfile]:
        connected = set(grid.get_node_ids())
        known = set(self.profiles) if ask_again else {*self.profiles, *self.refusals}
        self._query(grid, sorted(connected - known))
        return [profile for profile in self.in_order() if profile.node_id in connected]

    def wait_for_all(self, grid: Grid) -> list[NodeProfile]:
        """Wait until every partition that the nodes speak of is there, or the time is over.

        Raises
        ------
        TimeoutError
            If no node that can take part has answered by then, or for half a minute all that did
            cannot; with the reason of one of them.
        """
        started = time.monotonic()
        while True:
            profiles = self._refresh(grid, ask_again=False)
            if profiles and len(profiles) >= max(p.num_partitions for p in profiles):
                return profiles
            patience = min(self._timeout_s, _REFUSED_SECONDS) if self._nobody else self._timeout_s
            if time.monotonic() - started > patience:
                break
            time.sleep(_POLL_SECONDS)
        if not profiles and self.refusals:
            node_id, reason = next(iter(self.refusals.items()))
            raise TimeoutError(
                f"{len(self.refusals)} nodes answered, and none can take part; node {node_id}: "
                f"{reason}"
            )
        if not profiles:
            raise TimeoutError(f"no node answered within {self._timeout_s:.0f} s")
        _LOGGER.warning("only %d of %d nodes are here", len(profiles), profiles[0].num_partitions)
        return profiles

    @property
    def _nobody(self) -> bool:
        return bool(self.refusals) and not self.profiles

    def _query(self, grid: Grid, node_ids: Sequence[int]) -> None:
        if not node_ids:
            return
        messages = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in node_ids]
        for reply in grid.send_and_receive(messages, timeout=self._timeout_s):
            node_id = reply.metadata.src_node_id
            if reply.has_error():
                self._leave_out(node_id, reply.error.reason or f"error {reply.error.code}")
                continue
            try:
                self.profiles[node_id] = NodeProfile.from_reply(reply)
            except ValueError as error:
                self._leave_out(node_id, str(error))
            else:
                self.refusals.pop(node_id, None)

    def _leave_out(self, node_id: int, reason: str) -> None:
        self.refusals[node_id] = reason
        _LOGGER.warning("node %d is left out: %s", node_id, reason)


def scale_tiers(tiers: Iterable[tuple[T, float]], num_clients: int) -> list[T]:
    """Return one tier for each of ``num_clients``, in their proportions.

    Largest remainders: every tier gets its whole share, the rest goes to the largest fractions.

    Parameters
    ----------
    tiers
        ``(tier, share)``, where a tier is a rank or anything else; shares above 0.

    Raises
    ------
    ValueError
        If there is no tier or a share is not above 0.
    """
    table = list(tiers)
    if not table or any(share <= 0 for _, share in table):
        raise ValueError(f"ranks.tiers={table}: expected at least one, with shares above 0")
    total = sum(share for _, share in table)
    exact = [share / total * num_clients for _, share in table]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(table)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: num_clients - sum(counts)]:
        counts[index] += 1
    return [tier for (tier, _), count in zip(table, counts, strict=True) for _ in range(count)]
