"""Node profiles: what each node says it is and can do, and the directory of all nodes."""

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from textwrap import shorten
from typing import Final, TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from hafl_app.data.labels import label_fault
from hafl_app.federation.numbering import Numbering
from hafl_app.federation.questions import Questions
from hafl_app.federation.records import CONFIG, LABEL_NAMES

_LOGGER = logging.getLogger(__name__)
PROFILE = "profile"
UNNUMBERED: Final = -1
"""Stands for the ``partition_id`` of a node that has none before the server numbers it."""
_POLL_SECONDS = 0.2
_NEWCOMER_SECONDS = 5.0  # what a round waits for a new node's answer; a later one counts later
_START_SECONDS = 30.0
# What a stranger says must be possible, and fit on a line of a terminal.
_RANGES = {
    "rank": (1, 2**16),
    "num_examples": (0, 10**12),
    "memory_total_mb": (0, 10**9),
    "memory_free_mb": (0, 10**9),
}
_TEXTS = ("device", "device_name", "torch_version", "cuda_version")
_LONGEST_TEXT = 100
_LEAST_PARTITION = {"partition_id": 0, "num_partitions": 1}
_MOST_PARTITIONS = 10**9
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
        Which part of the data it holds, from 0. `UNNUMBERED` if it has data of its own and no
        number of its own: then the `NodeDirectory` gives it one.
    num_partitions
        How many parts there are; 0 for an unnumbered node.
    rank
        Its rank budget for every module that no pattern of `rank_pattern` matches, at least 1.
    num_examples
        Texts it trains on.
    device
        Kind of the device it trains on: ``cpu`` or ``cuda``.
    node_id
        Flower's id of the node, set by the server.
    rank_pattern
        Rank budgets of layer types, see `matches`; the first pattern that matches counts.
    own_data
        Whether its data are its own file, which the server must tell its number and the classes.
    label_names
        The classes in that file, if the server asked for them.
    device_name
        The device's model.
    memory_total_mb, memory_free_mb
        Of the device when the node was asked, in MB of 10^6 bytes; 0 is unknown.
    torch_version, cuda_version
        Of PyTorch, and of the CUDA that it was built with if any.
    """

    partition_id: int
    num_partitions: int
    rank: int
    num_examples: int
    device: str
    node_id: int = 0
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    own_data: bool = False
    label_names: tuple[str, ...] = ()
    device_name: str = ""
    memory_total_mb: int = 0
    memory_free_mb: int = 0
    torch_version: str = ""
    cuda_version: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that occurs in its budget."""
        return (self.rank, *self.rank_pattern.values())

    @property
    def device_line(self) -> str:
        """The device in a few words, with its free memory in GB of 10^9 bytes."""
        name = self.device if self.device == "cpu" else self.device_name or self.device
        free = self.memory_free_mb / 1000
        return f"{name}, {free:.{0 if free >= 100 else 1}f} GB free" if free else name

    def rank_of(self, module: str) -> int:
        """Return the rank budget of a module."""
        fitting = (rank for p, rank in self.rank_pattern.items() if matches(p, module))
        return next(fitting, self.rank)

    def to_record(self) -> ConfigRecord:
        """Write the profile for the wire."""
        values = asdict(self) | {"rank_pattern": json.dumps(dict(self.rank_pattern))}
        values["label_names"] = list(self.label_names)
        del values["node_id"]
        if self.partition_id == UNNUMBERED:
            del values["partition_id"], values["num_partitions"]
        return ConfigRecord({name.replace("_", "-"): value for name, value in values.items()})

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
            if known.get("own_data") is True and not set(_LEAST_PARTITION) & set(known):
                known |= {"partition_id": UNNUMBERED, "num_partitions": 0}
            labels = _read_labels(known.pop("label_names", []))
            node_id = reply.metadata.src_node_id
            profile = cls(node_id=node_id, rank_pattern=pattern, label_names=labels, **known)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a node profile: {shorten(str(error), 300)}") from error
        _check_values(profile)
        return profile


def _read_labels(names: object) -> tuple[str, ...]:
    """Read the classes of a stranger: they may come to decide the size of the head."""
    if not isinstance(names, list):
        raise ValueError(f"node profile: label_names is {str(names)[:80]!r}, expected a list")  # noqa: TRY004
    if fault := label_fault(names):
        raise ValueError(f"node profile: {fault}")
    return tuple(names)


def _check_values(profile: NodeProfile) -> None:
    for name, (least, most) in _RANGES.items():
        _check_number(name, getattr(profile, name), least, most)
    for name in _TEXTS:
        text = getattr(profile, name)
        if not isinstance(text, str) or len(text) > _LONGEST_TEXT or not text.isprintable():
            raise ValueError(
                f"node profile: {name} is {repr(text)[:80]}, expected a line of at most "
                f"{_LONGEST_TEXT} characters"
            )
    numbered = profile.partition_id != UNNUMBERED or not profile.own_data
    for name, least in (_LEAST_PARTITION if numbered else {}).items():
        _check_number(name, getattr(profile, name), least, _MOST_PARTITIONS)
    if numbered and not profile.partition_id < profile.num_partitions <= _MOST_PARTITIONS:
        raise ValueError(
            f"node profile: partition_id is {profile.partition_id}, expected below "
            f"num_partitions, {profile.num_partitions}, at most {_MOST_PARTITIONS}"
        )
    if type(profile.own_data) is not bool:
        raise ValueError(f"node profile: own_data is {profile.own_data!r}, expected true or false")


def _check_number(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"node profile: {name} is {repr(value)[:80]}, expected a whole number, at least "
            f"{least} and at most {most}"
        )


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
        least, most = _RANGES["rank"]
        valid = all(type(rank) is int and least <= rank <= most for rank in values.values())
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"rank pattern {text[:80]!r}: {error}") from error
    if odd:
        raise ValueError(f"rank pattern {odd[0][:80]!r}: expected a module's name, with \\d+ or .*")
    if not valid:
        raise ValueError(
            f"rank pattern {text[:80]!r}: ranks must be whole numbers from 1 to {most}"
        )
    return values


class NodeDirectory:
    """The nodes of a federation by id: asked once each, when they first appear.

    A node that does not answer is left out, and asked again after growing pauses; its answer
    counts from whenever it comes.

    Parameters
    ----------
    timeout_s
        How long to wait for answers while nobody is there who has given one.
    start_timeout_s
        How long `wait_for_all` waits for nodes; None is as long.
    num_nodes
        How many nodes it waits for if some have data of their own: these do not know.
    label_names
        The run's classes, told to every node that is asked; None while they are not agreed.
    numbering
        Numbers that nodes without one have been given in this run.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        start_timeout_s: float | None = None,
        num_nodes: int = 1,
        label_names: tuple[str, ...] | None = None,
        numbering: Numbering | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._start_timeout_s = timeout_s if start_timeout_s is None else start_timeout_s
        self._num_nodes = num_nodes
        self.label_names = label_names
        self.numbering = numbering or Numbering()
        self.profiles: dict[int, NodeProfile] = {}
        self.refusals: dict[int, str] = {}  # why nodes cannot take part, until they can
        self._questions = Questions()

    def in_order(self) -> list[NodeProfile]:
        """Return all profiles in partition order."""
        return sorted(self.profiles.values(), key=lambda p: (p.partition_id, p.node_id))

    def refresh(self, grid: Grid) -> list[NodeProfile]:
        """Query nodes that are new or could not take part, and return those that can.

        They come in partition order, and are connected. New nodes are waited for a few seconds,
        and longer while there is nobody else.
        """
        end = time.monotonic() + self._timeout_s
        asked = set(grid.get_node_ids()) - set(self.profiles)
        while True:
            self._query(grid, sorted(asked), min(_NEWCOMER_SECONDS, self._timeout_s))
            connected = set(grid.get_node_ids())
            present = self._present(connected)
            asked = connected - set(self.profiles) - set(self.refusals)
            if present or not asked or time.monotonic() >= end:
                return self._numbered(present)
            time.sleep(_POLL_SECONDS)

    def _present(self, connected: set[int]) -> list[NodeProfile]:
        return [profile for profile in self.in_order() if profile.node_id in connected]

    def refuse(self, node_id: int, reason: str) -> None:
        """Leave a node out whose answer does not suit the run, until another one does."""
        self.profiles.pop(node_id, None)
        if self.refusals.get(node_id) != reason:
            _LOGGER.warning("node %d is left out: %s", node_id, reason)
        self.refusals[node_id] = reason

    def wait_for_all(self, grid: Grid) -> list[NodeProfile]:
        """Wait until all nodes have answered, or the time is over.

        All are as many as the nodes speak of partitions, or as the run expects if some have data
        of their own. A node that cannot take part has answered too.

        Raises
        ------
        TimeoutError
            If no node that can take part has answered by then, or for half a minute all that did
            cannot; with the reason of one of them.
        """
        started = time.monotonic()
        while True:
            connected = set(grid.get_node_ids())
            unknown = connected - set(self.profiles) - set(self.refusals)
            self._query(grid, sorted(unknown), min(_START_SECONDS, self._start_timeout_s))
            profiles = self._present(connected)
            if profiles and len(profiles) + len(self.refusals) >= self._expected(profiles):
                return self._numbered(profiles)
            limit = self._start_timeout_s
            patience = min(limit, _REFUSED_SECONDS) if self._nobody else limit
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
            raise TimeoutError(f"no node answered within {self._start_timeout_s:.0f} s")
        _LOGGER.warning("only %d of %d nodes are here", len(profiles), self._expected(profiles))
        return self._numbered(profiles)

    def _expected(self, profiles: Sequence[NodeProfile]) -> int:
        if any(profile.own_data for profile in profiles):
            return self._num_nodes
        return max(profile.num_partitions for profile in profiles)

    @property
    def _nobody(self) -> bool:
        return bool(self.refusals) and not self.profiles

    def _query(self, grid: Grid, node_ids: Sequence[int], patience_s: float) -> None:
        """Ask these nodes, give those that are new a moment, and take in all answers there are."""
        content = RecordDict()
        if self.label_names is not None:
            content[CONFIG] = ConfigRecord({LABEL_NAMES: list(self.label_names)})
        new = self._questions.ask(grid, node_ids, content)
        answered = []
        for node_id, reply in self._questions.answers(grid, new, patience_s):
            if reply.has_error():
                self.refuse(node_id, reply.error.reason or f"error {reply.error.code}")
                continue
            try:
                answered.append(NodeProfile.from_reply(reply))
            except ValueError as error:
                self.refuse(node_id, str(error))
        self._admit(answered)

    def _admit(self, answered: Sequence[NodeProfile]) -> None:
        for profile in answered:
            if self.numbering.holds(profile.partition_id):
                number = profile.partition_id
                self.refuse(profile.node_id, f"partition-id {number} is another node's number")
                continue
            self.profiles[profile.node_id] = profile
            self.refusals.pop(profile.node_id, None)

    def _numbered(self, present: Sequence[NodeProfile]) -> list[NodeProfile]:
        """Give numbers to the nodes that have none, and return those that are present.

        Only now, and to all of them at once: who answers first must not decide.
        """
        lowest = max((p.num_partitions for p in self.profiles.values()), default=0)
        unnumbered = [p for p in self.profiles.values() if p.partition_id == UNNUMBERED]
        self.numbering.admit((profile.node_id for profile in unnumbered), lowest)
        for profile in unnumbered:
            number = self.numbering.of(profile.node_id)
            numbered = replace(profile, partition_id=number, num_partitions=number + 1)
            self.profiles[profile.node_id] = numbered
        return self._present({profile.node_id for profile in present})


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
