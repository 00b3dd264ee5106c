"""Node profiles: each node's share of data, rank budget and device, as it states them."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from textwrap import shorten
from typing import Final, TypeVar

from flwr.app import ConfigRecord, Message

from hafl_app.data.labels import label_fault

PROFILE = "profile"
UNNUMBERED: Final = -1
"""``partition_id`` of a node that has none before the server numbers it."""
# A profile is untrusted: values must be possible, and fit on a line of a terminal.
_RANGES = {
    "rank": (1, 2**16),
    "num_examples": (0, 10**12),
    "memory_total_mb": (0, 10**9),
    "memory_free_mb": (0, 10**9),
    "bandwidth_kbps": (0, 10**9),
}
_TEXTS = ("device", "device_name", "torch_version", "cuda_version", "precision")
_LONGEST_TEXT = 100
_LEAST_PARTITION = {"partition_id": 0, "num_partitions": 1}
_MOST_PARTITIONS = 10**9
T = TypeVar("T")
# A node's regular expression runs on the server: names and a few plain repetitions, so that no
# node can send one that runs forever.
_MOST_REPETITIONS, _MOST_REPETITIONS_IN_ALL = 3, 64  # of a pattern, and of a profile
_MOST_WILDCARDS = 32  # .* in all patterns together, which cost the most
_MOST_PATTERNS, _LONGEST_PATTERNS = 256, 2**15  # of a profile, in number and in characters
_HARMLESS = re.compile(r"(?:[\w|-]|\\?\.|\\d\+|\.\*){1,80}")


@dataclass(frozen=True)
class NodeProfile:
    """Answer of a node to a query.

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
        Whether its data are its own file; then requests carry its number and the classes.
    label_names
        The classes in that file, if the server asked for them.
    device_name
        The device's model.
    memory_total_mb, memory_free_mb
        Of the device when the node was asked, in MB of 10^6 bytes; 0 is unknown.
    torch_version, cuda_version
        Of PyTorch, and of the CUDA that it was built with if any.
    bandwidth_kbps
        Bandwidth of its uplink in 1000 bit/s, as its operator states it; 0 is unknown.
    precision
        What it computes in: ``fp32`` or ``bf16``; empty is unknown.
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
    bandwidth_kbps: int = 0
    precision: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that occurs in its budget."""
        return (self.rank, *self.rank_pattern.values())

    @property
    def device_line(self) -> str:
        """The device in a few words, with precision and free memory in GB of 10^9 bytes."""
        name = self.device if self.device == "cpu" else self.device_name or self.device
        free = self.memory_free_mb / 1000
        memory = f"{free:.{0 if free >= 100 else 1}f} GB free" if free else ""
        return ", ".join(part for part in (name, self.precision, memory) if part)

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
            unnumbered = known.get("own_data") is True and not set(_LEAST_PARTITION) & set(known)
            if unnumbered:
                known |= {"partition_id": UNNUMBERED, "num_partitions": 0}
            labels = _read_labels(known.pop("label_names", []))
            node_id = reply.metadata.src_node_id
            profile = cls(node_id=node_id, rank_pattern=pattern, label_names=labels, **known)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a node profile: {shorten(str(error), 300)}") from error
        _check_values(profile)
        if not unnumbered:  # not by its value: a node may send that of an unnumbered one
            _check_partition(profile)
        return profile


def _read_labels(names: object) -> tuple[str, ...]:
    """Read a node's classes, which may decide the size of the head."""
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
    own_data: object = profile.own_data
    if type(own_data) is not bool:
        given = repr(own_data)[:80]
        raise ValueError(f"node profile: own_data is {given}, expected true or false")


def _check_partition(profile: NodeProfile) -> None:
    for name, least in _LEAST_PARTITION.items():
        _check_number(name, getattr(profile, name), least, _MOST_PARTITIONS)
    if not profile.partition_id < profile.num_partitions:
        raise ValueError(
            f"node profile: partition_id is {profile.partition_id}, expected below "
            f"num_partitions, {profile.num_partitions}"
        )


def _check_number(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"node profile: {name} is {repr(value)[:80]}, expected a whole number, at least "
            f"{least} and at most {most}"
        )


@lru_cache(maxsize=2**16)
def matches(pattern: str, module: str) -> bool:
    r"""Whether a pattern matches a module, as keys of PEFT's ``rank_pattern`` do.

    It is a regular expression for the whole name or for an end of it that starts after a dot:
    ``output.dense`` matches ``layer.0.output.dense`` and ``layer.0.attention.output.dense``, and
    ``layer.\d+.output.dense`` only the first.
    """
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _is_harmless(pattern: str) -> bool:
    return bool(_HARMLESS.fullmatch(pattern)) and _repetitions(pattern) <= _MOST_REPETITIONS


def _repetitions(pattern: str) -> int:
    return pattern.count("+") + pattern.count("*")


def _read_pattern(text: str) -> dict[str, int]:
    if len(text) > _LONGEST_PATTERNS:
        raise ValueError(
            f"rank patterns of {len(text)} characters, expected at most {_LONGEST_PATTERNS}"
        )
    try:
        values: dict[str, int] = json.loads(text)
        if len(values) > _MOST_PATTERNS:
            raise ValueError(f"{len(values)} patterns, expected at most {_MOST_PATTERNS}")  # noqa: TRY301
        if (wildcards := sum(p.count("*") for p in values)) > _MOST_WILDCARDS:
            raise ValueError(f"{wildcards} times .*, expected at most {_MOST_WILDCARDS}")  # noqa: TRY301
        odd = [p for p in values if not _is_harmless(p)]
        repetitions = sum(map(_repetitions, values))
        least, most = _RANGES["rank"]
        valid = all(type(rank) is int and least <= rank <= most for rank in values.values())
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"rank pattern {text[:80]!r}: {error}") from error
    if odd:
        raise ValueError(f"rank pattern {odd[0][:80]!r}: expected a module's name, with \\d+ or .*")
    if repetitions > _MOST_REPETITIONS_IN_ALL:
        raise ValueError(
            f"rank patterns with {repetitions} repetitions, expected at most "
            f"{_MOST_REPETITIONS_IN_ALL}"
        )
    if not valid:
        raise ValueError(
            f"rank pattern {text[:80]!r}: ranks must be whole numbers from 1 to {most}"
        )
    return values


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
