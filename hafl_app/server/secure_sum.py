"""The server's part of a secure sum: it passes keys and shares on, adds up, and takes masks off.

One round: `agree` lets the members exchange keys and shares, `record_for` goes with each request
to train, `take` reads a masked upload, and `opened` returns the updates of those who answered, in
which every component is the mean over those who trained it. A method whose fold is a sum makes of
them what it would have made of the updates themselves. Where clients weigh themselves, an update
has the mean weight of those with the same components.
"""

import logging
from collections.abc import Mapping, Sequence
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
from hafl_app.privacy.pieces import Shares as OwnShares
from hafl_app.privacy.pieces import piece_names, pieces_of, weight_names
from hafl_app.server.replies import all_replies
from hafl_app.server.secure_means import mean_changes, own_weights, with_change
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
        self._plans: dict[int, TrainPlan] = {}
        self._plan_texts: dict[str, int] = {}
        self._plan_of: dict[int, int] = {}
        self._examples: dict[int, int] = {}
        self._weights: dict[int, float] = {}
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
        examples: Sequence[int],
        weights: Sequence[float],
        head: Sequence[str],
    ) -> None:
        """Note what each member uploads, and what it counts.

        Parameters
        ----------
        examples
            Weights in the head.
        weights
            Those in components, but for members that weigh themselves.
        head
            Names of the head's tensors that they upload.

        Raises
        ------
        SecureSumError
            If a number would be summed over fewer than three members.
        """
        members = [profile.node_id for profile in profiles]
        self._plans = dict(zip(members, plans, strict=True))
        self._examples = dict(zip(members, examples, strict=True))
        self._weights = dict(zip(members, weights, strict=True))
        for member, plan in self._plans.items():
            self._names[member] = piece_names(plan, head)
            number = self._plan_texts.setdefault(plan.to_json(), len(self._plan_texts))
            self._plan_of[member] = number
        check_members(self._names.values())

    def record_for(self, node_id: int) -> AskMasked:
        """Return what goes with a member's request to train."""
        others = [member for member in self._names if member != node_id]
        shares = self._shares_of(node_id)
        return AskMasked(
            self._round,
            others,
            [self._shares[member][node_id] for member in others],
            list(self._plan_texts),
            [self._plan_of[member] for member in others],
            shares.components,
            shares.head,
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
        lengths |= dict.fromkeys(weight_names(plan).values(), 1)
        self._vectors[node_id] = read_vector(content, lengths, sorted(lengths))

    def examples(self, node_id: int) -> int:
        """Return the number of examples that a member counts as."""
        return self._examples[node_id]

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
        total = self._unmasked(there, missing, valid[: self.threshold])
        sums = Rounding(self._largest, len(self._names)).decode(total)
        weights = own_weights({member: self._plans[member] for member in there}, sums)
        means = mean_changes(
            sums,
            (
                self._shares_of(member, own).by_piece(self._plans[member], self._names[member])
                for member, own in weights.items()
            ),
        )
        return [with_change(u, means, weights[numbers[u.partition_id]]) for u in updates]

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

    def _shares_of(self, member: int, own: Mapping[str, float] | None = None) -> OwnShares:
        return OwnShares(
            self._weights[member] / max(self._weights.values()),
            self._examples[member] / max(self._examples.values()),
            own or {},
        )

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
