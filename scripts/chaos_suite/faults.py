"""Faults of clients and of the network: which reply gets which, and what each does to it."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import numpy as np
from flwr.app import Message

from hafl_app.wire.arrays import Float32
from hafl_app.wire.records import (
    METRICS,
    NUM_EXAMPLES,
    AdapterArrays,
    adapter_content,
    read_adapter,
    read_plan,
)

_SCALE, _MANY_EXAMPLES = 1e6, 10**9


class Kind(StrEnum):
    """Fault of a reply."""

    DROPPED = "dropped"
    LATE = "late"
    DUPLICATED = "duplicated"
    WRONG_SHAPES = "wrong shapes"
    WRONG_RANKS = "wrong ranks"
    WRONG_NAMES = "wrong module names"
    NAN = "NaN"
    INF = "Inf"
    NO_EXAMPLES = "zero num-examples"
    MANY_EXAMPLES = "huge num-examples"
    SCALED = "scaled by 1e6"
    IMPORTANCE_INF = "importance Inf"
    IMPORTANCE_NEGATIVE = "importance negative"
    SIGN_FLIPPED = "sign flipped"
    # Not drawn: a late reply, delivered with those of the next round.
    STALE = "late, in the next round"

    @property
    def is_malformed(self) -> bool:
        """Whether the server must detect it: all but a wrong direction of usual size."""
        return self is not Kind.SIGN_FLIPPED

    @property
    def is_extra(self) -> bool:
        """Whether the reply is a further one beside the one that counts."""
        return self in {Kind.DUPLICATED, Kind.STALE}


DRAWN = tuple(kind for kind in Kind if kind is not Kind.STALE)


class Schedule(Protocol):
    """Schedule of faults: a function of round and attempt, so that a resumed run repeats it."""

    def of_round(self, server_round: int, attempt: int) -> Mapping[int, Kind]:
        """Return the fault of every faulty partition.

        Parameters
        ----------
        server_round
            From 1.
        attempt
            From 0; a round that did not work is repeated.
        """


@dataclass(frozen=True)
class NoFaults:
    """Schedule without faults of clients or network."""

    def of_round(self, server_round: int, attempt: int) -> Mapping[int, Kind]:
        """Return no fault."""
        return {}


@dataclass(frozen=True)
class RandomFaults:
    """Schedule in which a share of all replies is faulty, by all kinds in equal shares.

    The number of faults up to a round is the rounded product, and kinds follow each other as
    shuffled packs, so rate and shares hold exactly and not only on average.

    Parameters
    ----------
    seed
        Of the draws.
    bad
        Share of the replies, in [0, 1].
    num_clients
        Partitions are 0 to ``num_clients - 1``.
    """

    seed: int
    bad: float
    num_clients: int

    def of_round(self, server_round: int, attempt: int) -> Mapping[int, Kind]:
        """Draw the partitions of a round, and deal each its kind."""
        per_round = self.bad * self.num_clients
        positions = range(round(per_round * (server_round - 1)), round(per_round * server_round))
        draw = random.Random(f"{self.seed}/chaos/{server_round}/{attempt}")
        partitions = draw.sample(range(self.num_clients), len(positions))
        return {p: self._kind(i, attempt) for p, i in zip(partitions, positions, strict=True)}

    def _kind(self, position: int, attempt: int) -> Kind:
        pack, place = divmod(position, len(DRAWN))
        shuffled = random.Random(f"{self.seed}/chaos/pack/{pack}/{attempt}")
        return shuffled.sample(DRAWN, len(DRAWN))[place]


@dataclass(frozen=True)
class SignFlippers:
    """Byzantine clients: a share, always the same, uploads the opposite of what it learned.

    Parameters
    ----------
    seed, num_clients
        As in `RandomFaults`.
    share
        Of the clients, in [0, 1].
    """

    seed: int
    share: float
    num_clients: int

    def of_round(self, server_round: int, attempt: int) -> Mapping[int, Kind]:
        """Return the flippers, the same in every round."""
        return dict.fromkeys(self.partitions, Kind.SIGN_FLIPPED)

    @property
    def partitions(self) -> list[int]:
        """Partitions of the flippers, in order."""
        draw = random.Random(f"{self.seed}/chaos/flippers")
        return sorted(draw.sample(range(self.num_clients), round(self.share * self.num_clients)))


def spoil(reply: Message, request: Message, kind: Kind) -> None:
    """Make the content of a training reply faulty; its sender and its request stay.

    Parameters
    ----------
    reply
        Honest, with content.
    request
        That it answers.
    kind
        One that changes the content; the others leave it as it is.
    """
    metrics = reply.content.metric_records[METRICS]
    if kind in _EXAMPLES:
        metrics[NUM_EXAMPLES] = _EXAMPLES[kind]
    elif kind in _SPOILED:
        upload = read_adapter(reply.content)
        spoiled = _SPOILED[kind](upload, _before(request, upload))
        reply.content = adapter_content(spoiled, **{METRICS: metrics})


def _before(request: Message, upload: AdapterArrays) -> AdapterArrays:
    """Return the uploaded components and the head as they were when they were sent."""
    sent, plan = read_adapter(request.content), read_plan(request.content)
    modules = {}
    for name, (lora_A, lora_B) in upload.modules.items():
        slots = list(plan.modules[name].trainable_slots[: lora_A.shape[0]])
        sent_A, sent_B = sent.modules[name]
        # A factor that is not uploaded has no features.
        width, height = lora_A.shape[1], lora_B.shape[0]
        modules[name] = (sent_A[slots, :width], sent_B[:height, slots])
    return AdapterArrays(modules, {name: sent.head[name] for name in upload.head})


def _moved(upload: AdapterArrays, before: AdapterArrays, factor: float) -> AdapterArrays:
    """Return ``before + factor * (upload - before)``, factors and head alike."""

    def move(new: Float32, old: Float32) -> Float32:
        return (old + factor * (new.astype(np.float64) - old)).astype(np.float32)

    modules = {
        name: (move(lora_A, before.modules[name][0]), move(lora_B, before.modules[name][1]))
        for name, (lora_A, lora_B) in upload.modules.items()
    }
    head = {name: move(array, before.head[name]) for name, array in upload.head.items()}
    return replace(upload, modules=modules, head=head)


def _with_first_module(
    upload: AdapterArrays, change: Callable[[Float32, Float32], Sequence[Float32]]
) -> AdapterArrays:
    name, (lora_A, lora_B) = next(iter(upload.modules.items()))
    new_A, new_B = change(lora_A, lora_B)
    return replace(upload, modules={**upload.modules, name: (new_A, new_B)})


def _with_number(upload: AdapterArrays, number: float) -> AdapterArrays:
    def put(lora_A: Float32, lora_B: Float32) -> Sequence[Float32]:
        spoiled = lora_B.copy()
        spoiled[-1, 0] = number
        return lora_A, spoiled

    return _with_first_module(upload, put)


def _renamed(upload: AdapterArrays) -> AdapterArrays:
    first, *others = upload.modules
    modules = {f"{first}.other": upload.modules[first]}
    return replace(upload, modules=modules | {name: upload.modules[name] for name in others})


def _with_score(upload: AdapterArrays, score: float) -> AdapterArrays:
    """Spoil the last score; a reply without scores gets one that was not asked for."""
    name = list(upload.importance or upload.modules)[-1]
    scores = np.array(upload.importance.get(name, [1.0]), np.float32)
    scores[-1:] = score
    return replace(upload, importance={**upload.importance, name: scores})


_EXAMPLES = {Kind.NO_EXAMPLES: 0, Kind.MANY_EXAMPLES: _MANY_EXAMPLES}
_SPOILED: Mapping[Kind, Callable[[AdapterArrays, AdapterArrays], AdapterArrays]] = {
    Kind.WRONG_SHAPES: lambda up, _: _with_first_module(up, lambda a, b: (a[:, :-1], b)),
    Kind.WRONG_RANKS: lambda up, _: _with_first_module(
        up, lambda a, b: (np.vstack([a, a[:1]]), np.hstack([b, b[:, :1]]))
    ),
    Kind.WRONG_NAMES: lambda up, _: _renamed(up),
    Kind.NAN: lambda up, _: _with_number(up, np.nan),
    Kind.INF: lambda up, _: _with_number(up, np.inf),
    Kind.SCALED: lambda up, before: _moved(up, before, _SCALE),
    Kind.IMPORTANCE_INF: lambda up, _: _with_score(up, np.inf),
    Kind.IMPORTANCE_NEGATIVE: lambda up, _: _with_score(up, -1.0),
    Kind.SIGN_FLIPPED: lambda up, before: _moved(up, before, -1.0),
}
