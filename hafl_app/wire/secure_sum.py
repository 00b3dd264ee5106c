"""Messages of a secure sum as Flower records: keys, shares, masked vectors, unmasking."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from hafl_app.plan import TrainPlan
from hafl_app.wire.arrays import RecordError

SECURE, VECTOR = "secure-sum", "masked"
_STAGE, _MOST_MEMBERS = "stage", 10_000


@dataclass(frozen=True)
class AskKeys:
    """Request for a member's public keys."""

    server_round: int


@dataclass(frozen=True)
class Keys:
    """A member's public keys: for encryption, and for the masks that it shares."""

    encryption: bytes
    masking: bytes


@dataclass(frozen=True)
class AskShares:
    """All members' public keys, in the order of the members, and how many open a secret."""

    server_round: int
    threshold: int
    members: list[int]
    encryption: list[bytes]
    masking: list[bytes]


@dataclass(frozen=True)
class Shares:
    """A member's shares of its secrets, encrypted for each of the others, and for whom."""

    members: list[int]
    encrypted: list[bytes]


@dataclass(frozen=True)
class AskMasked:
    """Beside a request to train: shares from the others, all members' plans, and the rounding.

    Parameters
    ----------
    members, encrypted
        Those who have shared their secrets, without the receiver, and what each sent it.
    plans, plan_of
        The different plans of all members, and which of them each of ``members`` has.
    share, head_share
        The receiver's weight in components, unless its plan has it weigh itself, and in the head,
        both in (0, 1].
    largest
        Largest change of a number.
    """

    server_round: int
    members: list[int]
    encrypted: list[bytes]
    plans: list[str]
    plan_of: list[int]
    share: float
    head_share: float
    largest: float


@dataclass(frozen=True)
class AskUnmask:
    """Request for the shares that open the sum: whose vector came, and whose did not."""

    server_round: int
    there: list[int]
    missing: list[int]


@dataclass(frozen=True)
class Unmask:
    """A member's shares: of the own masks of those whose vector came, of the keys of the others."""

    there: list[int]
    masks: list[bytes]
    missing: list[int]
    keys: list[bytes]


SecureMessage = AskKeys | Keys | AskShares | Shares | AskMasked | AskUnmask | Unmask
_Kind = TypeVar("_Kind", AskKeys, Keys, AskShares, Shares, AskMasked, AskUnmask, Unmask)


def secure_record(message: SecureMessage) -> ConfigRecord:
    """Write a message."""
    return ConfigRecord({_STAGE: type(message).__name__, **asdict(message)})


def is_secure(content: RecordDict) -> bool:
    """Whether a content has a part of a secure sum."""
    return SECURE in content


def stage_of(content: RecordDict) -> str:
    """Return the name of the kind of message that a content has; empty if it has none."""
    record = content.get(SECURE)
    return str(record.get(_STAGE, "")) if isinstance(record, ConfigRecord) else ""


def read_secure(content: RecordDict, kind: type[_Kind]) -> _Kind:
    """Read a message of one kind.

    Raises
    ------
    RecordError
        If there is none, or a value is missing, of another type, or beyond what a sum may have.
    """
    record = content.get(SECURE)
    if not isinstance(record, ConfigRecord) or stage_of(content) != kind.__name__:
        raise RecordError(f"no {kind.__name__!r} of a secure sum in the message")
    values: dict[str, Any] = {}
    for field in fields(kind):
        value = record.get(field.name)
        if not _is_of(value, str(field.type)):
            raise RecordError(f"{SECURE}: {field.name!r} is missing, or no {field.type}")
        values[field.name] = value
    return kind(**values)


def _is_of(value: object, expected: str) -> bool:
    """Whether a value has the type that a field of these messages is annotated with."""
    kinds = {"int": int, "float": float, "str": str, "bytes": bytes}
    name = expected.removeprefix("<class '").removesuffix("'>")
    if not name.startswith("list["):
        return type(value) is kinds[name]
    inner = kinds[name.removeprefix("list[").removesuffix("]")]
    is_list = isinstance(value, list) and len(value) <= _MOST_MEMBERS
    return is_list and all(type(item) is inner for item in value)  # type: ignore[attr-defined]


def plans_of(asked: AskMasked) -> dict[int, TrainPlan]:
    """Return the plan of each of the other members.

    Raises
    ------
    RecordError
        If a member has none, or one is no plan.
    """
    if len(asked.plan_of) != len(asked.members) or len(asked.encrypted) != len(asked.members):
        raise RecordError(f"{SECURE}: not one plan and one message for each member")
    if not all(0 <= number < len(asked.plans) for number in asked.plan_of):
        raise RecordError(f"{SECURE}: a member has none of the plans")
    try:
        plans = [TrainPlan.from_json(text) for text in asked.plans]
    except ValueError as error:
        raise RecordError(f"{SECURE}: {error}") from error
    return {m: plans[number] for m, number in zip(asked.members, asked.plan_of, strict=True)}


def write_vector(pieces: Mapping[str, NDArray[np.uint32]], order: Sequence[str]) -> ArrayRecord:
    """Write masked pieces behind one another, in this order."""
    flat = np.concatenate([pieces[name] for name in order]) if order else np.zeros(0, np.uint32)
    data = flat.astype("<u4").tobytes()
    return ArrayRecord({VECTOR: Array("uint32", (len(flat),), "numpy.raw", data)})


def read_vector(
    content: RecordDict, lengths: Mapping[str, int], order: Sequence[str]
) -> dict[str, NDArray[np.uint32]]:
    """Read the pieces of `write_vector`.

    Raises
    ------
    RecordError
        If there are none, or not as many numbers as the pieces have.
    """
    record = content.get(VECTOR)
    array = record.get(VECTOR) if isinstance(record, ArrayRecord) else None
    if array is None or array.dtype != "uint32":
        raise RecordError("no masked vector in the message")
    total = sum(lengths[name] for name in order)
    if len(array.data) != 4 * total:
        raise RecordError(f"{len(array.data)} masked bytes, expected {4 * total}")
    flat, pieces, start = np.frombuffer(array.data, "<u4"), {}, 0
    for name in order:
        pieces[name] = flat[start : start + lengths[name]]
        start += lengths[name]
    return pieces
