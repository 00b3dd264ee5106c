"""The server's part of a secure sum: it passes keys and shares on, adds up, and takes masks off.

One round: `agree` lets the members exchange keys and shares, `record_for` goes with each request
to train, `take` reads a masked upload, and `opened` returns the updates of those who answered, in
which every component is the mean over those who trained it. A method whose fold is a sum makes of
them what it would have made of the updates themselves.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.serverapp import Grid
from numpy.typing import NDArray

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.printable import printable
from hafl_app.privacy.masking import (
    FEWEST_MEMBERS,
    Names,
    Rounding,
    SecureSumError,
    add_mask,
    check_members,
    key_of,
    pair_sign,
    shared_seed,
)
from hafl_app.privacy.mechanism import trained_part
from hafl_app.privacy.pieces import piece_names, pieces_of, with_pieces
from hafl_app.server.replies import all_replies
from hafl_app.server.traffic import Ledger, Traffic
from hafl_app.server.update import ClientUpdate
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.message_size import content_size
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import message_bytes
from hafl_app.wire.secure_sum import (
    SECURE,
    AskKeys,
    AskMasked,
    AskShares,
    AskUnmask,
    Keys,
    SecureMessage,
    Shares,
    Unmask,
    read_secure,
    read_vector,
    secure_record,
)

_LOGGER = logging.getLogger(__name__)
_Answer = TypeVar("_Answer", Keys, Shares, Unmask)


class SecureSum:
    """The secure sum of one round.

    Parameters
    ----------
    grid
        Of the nodes.
    ledger
        Where the bytes of its messages are entered.
    server_round
        Round, from 1.
    timeout_s
        Seconds that each of its three exchanges waits for answers.
    largest
        Largest change of a number, see `hafl_app.privacy.masking.Rounding`.
    """

    def __init__(
        self, grid: Grid, ledger: Ledger, server_round: int, timeout_s: float, largest: float
    ) -> None:
        self._grid = grid
        self._ledger, self._round = ledger, server_round
        self._timeout_s, self._largest = timeout_s, float(largest)
        self._profiles: dict[int, NodeProfile] = {}
        self._keys: dict[int, Keys] = {}
        self._shares: dict[int, Mapping[int, bytes]] = {}
        self._names: dict[int, Names] = {}
        self._plans: list[str] = []
        self._plan_of: dict[int, int] = {}
        self._weights: dict[int, int] = {}
        self._vectors: dict[int, dict[str, NDArray[np.uint32]]] = {}

    def agree(self, profiles: Sequence[NodeProfile]) -> list[NodeProfile]:
        """Let these nodes exchange keys and shares; return those that have.

        Raises
        ------
        SecureSumError
            If they are fewer than three, or fewer than open a secret.
        """
        self._profiles = {profile.node_id: profile for profile in profiles}
        keys = self._ask(dict.fromkeys(self._profiles, AskKeys(self._round)), Keys)
        self._check_count(len(keys), FEWEST_MEMBERS, "have sent keys")
        self._keys = keys
        asked = AskShares(
            self._round,
            self.threshold,
            list(keys),
            [one.encryption for one in keys.values()],
            [one.masking for one in keys.values()],
        )
        answers = self._ask(dict.fromkeys(keys, asked), Shares)
        for member, shares in answers.items():
            if sorted(shares.members) == sorted(keys.keys() - {member}):
                self._shares[member] = dict(zip(shares.members, shares.encrypted, strict=False))
        least = max(FEWEST_MEMBERS, self.threshold)
        self._check_count(len(self._shares), least, "have shared their secrets")
        return [profile for profile in profiles if profile.node_id in self._shares]

    @property
    def threshold(self) -> int:
        """Members whose shares open a secret, and who must answer: more than half."""
        return len(self._keys) // 2 + 1

    def plan(
        self,
        profiles: Sequence[NodeProfile],
        plans: Sequence[TrainPlan],
        weights: Sequence[int],
        head: Sequence[str],
    ) -> None:
        """Note what each member uploads, and what it counts.

        Parameters
        ----------
        head
            Names of the head's tensors that they upload.

        Raises
        ------
        SecureSumError
            If a number would be summed over fewer than three members.
        """
        numbers: dict[str, int] = {}
        for profile, plan, weight in zip(profiles, plans, weights, strict=True):
            self._names[profile.node_id] = piece_names(plan, head)
            self._weights[profile.node_id] = weight
            self._plan_of[profile.node_id] = numbers.setdefault(plan.to_json(), len(numbers))
        self._plans = list(numbers)
        check_members(self._names.values())

    def record_for(self, node_id: int) -> SecureMessage:
        """Return what goes with a member's request to train."""
        others = [member for member in self._names if member != node_id]
        return AskMasked(
            self._round,
            others,
            [self._shares[member][node_id] for member in others],
            self._plans,
            [self._plan_of[member] for member in others],
            self._share(node_id),
            self._largest,
        )

    def take(self, node_id: int, content: RecordDict, plan: TrainPlan, sent: Adapter) -> None:
        """Keep a masked upload.

        Raises
        ------
        RecordError
            If there is none, or not as many numbers as the plan's.
        """
        pieces = pieces_of(trained_part(sent, plan), plan)
        lengths = {name: len(piece) for name, piece in pieces.items()}
        self._vectors[node_id] = read_vector(content, lengths, sorted(lengths))

    def weight(self, node_id: int) -> int:
        """Return the number of examples that a member counts as."""
        return self._weights[node_id]

    def opened(self, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """Open the sum over these members; return their updates with the mean in each component.

        Raises
        ------
        SecureSumError
            If they are too few, or too few of them answer.
        """
        numbers = {profile.partition_id: node_id for node_id, profile in self._profiles.items()}
        there = [numbers[update.partition_id] for update in updates]
        missing = [member for member in self._names if member not in there]
        self._check_count(len(there), max(FEWEST_MEMBERS, self.threshold), "have uploaded")
        check_members(self._names[member] for member in there)
        asked = AskUnmask(self._round, there, missing)
        answers = self._ask(dict.fromkeys(there, asked), Unmask)
        valid = [a for a in answers.values() if (a.there, a.missing) == (there, missing)]
        self._check_count(len(valid), self.threshold, "have opened the sum")
        means = self._means(there, self._unmasked(there, missing, valid[: self.threshold]))
        return [_with_change(update, means) for update in updates]

    def _unmasked(
        self, there: Sequence[int], missing: Sequence[int], answers: Sequence[Unmask]
    ) -> dict[str, NDArray[np.uint32]]:
        """Return the sum of the vectors without their masks."""
        total: dict[str, NDArray[np.uint32]] = {}
        for member in there:
            for name, piece in self._vectors[member].items():
                total[name] = total[name] + piece if name in total else piece
        for place, member in enumerate(there):
            seed = _combined([answer.masks[place] for answer in answers])
            add_mask(total, seed, self._names[member], -1)
        for place, member in enumerate(missing):
            private = key_of(_combined([answer.keys[place] for answer in answers]))
            for other in there:
                seed = shared_seed(private, self._keys[other].masking)
                common = self._names[member] & self._names[other]
                add_mask(total, seed, common, -pair_sign(other, member))
        return total

    def _means(
        self, there: Sequence[int], total: Mapping[str, NDArray[np.uint32]]
    ) -> dict[str, NDArray[np.float64]]:
        sums = Rounding(self._largest, len(self._names)).decode(total)
        shares = dict.fromkeys(sums, 0.0)
        for member in there:
            for name in self._names[member]:
                shares[name] += self._share(member)
        return {name: piece / shares[name] for name, piece in sums.items()}

    def _share(self, node_id: int) -> float:
        return self._weights[node_id] / max(self._weights.values())

    def _check_count(self, count: int, least: int, what: str) -> None:
        if count < least:
            raise SecureSumError(
                f"{count} of {len(self._profiles)} clients {what}, the secure sum needs {least}"
            )

    def _ask(self, asked: Mapping[int, SecureMessage], kind: type[_Answer]) -> dict[int, _Answer]:
        """Ask members; return the valid answers, in the order of the members."""
        messages = {
            node_id: Message(
                RecordDict({SECURE: secure_record(one)}),
                node_id,
                MessageType.QUERY,
                group_id=str(self._round),
            )
            for node_id, one in asked.items()
        }
        answers = {}
        for reply in all_replies(self._grid, list(messages.values()), self._timeout_s):
            node_id = reply.metadata.src_node_id
            mine = messages.get(node_id)
            if mine is None or reply.metadata.reply_to_message_id != mine.metadata.message_id:
                continue
            self._enter(node_id, content_size(mine.content), message_bytes(reply))
            try:
                answers[node_id] = _read(reply, kind)
            except RecordError as error:
                _LOGGER.warning("round %d, node %d: %s", self._round, node_id, error)
        return {node_id: answers[node_id] for node_id in asked if node_id in answers}

    def _enter(self, node_id: int, bytes_down: int, bytes_up: int) -> None:
        traffic = Traffic(bytes_down=bytes_down, bytes_up=bytes_up)
        self._ledger.add(self._round, MessageType.TRAIN, self._profiles[node_id].rank, traffic)


def _read(reply: Message, kind: type[_Answer]) -> _Answer:
    if reply.has_error():
        raise RecordError(printable(reply.error.reason or f"error {reply.error.code}"))
    return read_secure(reply.content, kind)


def _combined(shares: list[bytes]) -> bytes:
    try:
        secret: bytes = combine_shares(shares)
    except (ValueError, IndexError) as error:
        raise SecureSumError("the shares of a secret do not belong together") from error
    return secret


def _with_change(update: ClientUpdate, means: Mapping[str, NDArray[np.float64]]) -> ClientUpdate:
    """Return an update in which the trained numbers have changed by these means."""
    before = update.before
    trained = before.only(update.plan.uploaded_factors)
    change = with_pieces(trained, update.plan, means).tensors()
    moved = {n: (t.double() + change[n]).to(t.dtype) for n, t in trained.tensors().items()}
    return replace(update, adapter=Adapter.from_tensors(moved).filled(before))
