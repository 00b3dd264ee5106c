"""A node's part of a secure sum: keys, shares, a masked vector, and shares that open the sum.

What it keeps between the messages of a round is in Flower's context state. It opens a round once,
and only a sum in which every number is one of at least three clients that it was told of.
"""

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.fernet import InvalidToken
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt
from flwr.common.secure_aggregation.secaggplus_utils import (
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from numpy.typing import NDArray

from hafl_app.lowrank.change import change_of
from hafl_app.lowrank.factors import Adapter
from hafl_app.lowrank.product_norms import product_norms
from hafl_app.plan import TrainPlan
from hafl_app.privacy.masking import (
    FEWEST_MEMBERS,
    Names,
    Rounding,
    SecureSumError,
    add_mask,
    check_members,
    key_bytes,
    key_of,
    pair_sign,
    shared_seed,
)
from hafl_app.privacy.pieces import Shares as OwnShares
from hafl_app.privacy.pieces import piece_names, pieces_of, weight_names
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.secure_sum import (
    SECURE,
    AskKeys,
    AskMasked,
    AskShares,
    AskUnmask,
    Keys,
    Shares,
    Unmask,
    plans_of,
    read_secure,
    secure_record,
    stage_of,
)

_STATE, _SEED_BYTES = "secure-sum", 32
_HAS_KEYS, _HAS_SHARED, _HAS_MASKED = 1, 2, 3


def answer_secure(message: Message, state: RecordDict) -> Message:
    """Answer a message of a secure sum, but for the request to train.

    Raises
    ------
    RecordError
        If it is none that a node answers.
    SecureSumError
        If the node does not.
    """
    content, own_id = message.content, message.metadata.dst_node_id
    answer: Keys | Shares | Unmask
    match stage_of(content):
        case AskKeys.__name__:
            answer = make_keys(state, read_secure(content, AskKeys))
        case AskShares.__name__:
            answer = share_secrets(state, own_id, read_secure(content, AskShares))
        case AskUnmask.__name__:
            answer = open_sum(state, read_secure(content, AskUnmask))
        case stage:
            raise RecordError(f"{SECURE}: {stage[:40]!r} is no request of a secure sum")
    return Message(RecordDict({SECURE: secure_record(answer)}), reply_to=message)


def make_keys(state: RecordDict, asked: AskKeys) -> Keys:
    """Make new keys for a round; those of an earlier one are forgotten."""
    encryption, of_encryption = generate_key_pairs()
    masking, of_masking = generate_key_pairs()
    state[_STATE] = ConfigRecord(
        {
            "round": asked.server_round,
            "stage": _HAS_KEYS,
            "encryption": key_bytes(encryption),
            "masking": key_bytes(masking),
        }
    )
    return Keys(public_key_to_bytes(of_encryption), public_key_to_bytes(of_masking))


def share_secrets(state: RecordDict, own_id: int, asked: AskShares) -> Shares:
    """Share the key of the masks and the seed of an own mask, encrypted for each member.

    Raises
    ------
    SecureSumError
        If too few take part, too few shares would open a secret, or a key is not its own.
    """
    kept = _kept(state, asked.server_round, _HAS_KEYS)
    members = asked.members
    if len(set(members)) < max(FEWEST_MEMBERS, len(members)) or own_id not in members:
        raise SecureSumError(f"{len(set(members))} members, expected {FEWEST_MEMBERS} or more")
    if not len(members) / 2 < asked.threshold <= len(members):
        raise SecureSumError(f"{asked.threshold} of {len(members)} shares would open a secret")
    private, place = key_of(kept["encryption"]), members.index(own_id)
    own_keys = [
        public_key_to_bytes(key_of(kept[n]).public_key()) for n in ("encryption", "masking")
    ]
    if own_keys != [asked.encryption[place], asked.masking[place]]:
        raise SecureSumError("the keys under the own number are not the own ones")
    seed = secrets.token_bytes(_SEED_BYTES)
    of_seed = create_shares(seed, asked.threshold, len(members))
    of_key = create_shares(kept["masking"], asked.threshold, len(members))
    sent = {}
    for member, key, seed_share, key_share in zip(
        members, asked.encryption, of_seed, of_key, strict=True
    ):
        text = share_keys_plaintext_concat(own_id, member, seed_share, key_share)
        sent[member] = text if member == own_id else encrypt(shared_seed(private, key), text)
    kept |= {
        "stage": _HAS_SHARED,
        "seed": seed,
        "own": sent.pop(own_id),
        "threshold": asked.threshold,
        "members": members,
        "encryption-keys": asked.encryption,
        "masking-keys": asked.masking,
    }
    state[_STATE] = ConfigRecord(kept)
    return Shares(list(sent), list(sent.values()))


def masked(
    state: RecordDict,
    own_id: int,
    asked: AskMasked,
    plan: TrainPlan,
    after: Adapter,
    before: Adapter,
) -> dict[str, NDArray[np.uint32]]:
    """Return the change of an upload as whole numbers under masks, by piece.

    Parameters
    ----------
    after, before
        The upload, and the same components and head as received.

    Raises
    ------
    SecureSumError
        If a number would be one of fewer than three clients', or changed by more than is covered.
    """
    kept = _kept(state, asked.server_round, _HAS_SHARED)
    names = _names(asked, plan, own_id, after)
    _check_known(kept, names)
    check_members(names.values())
    shares = _decrypted(kept, own_id, asked)
    vector = _encoded(asked, plan, after, before, len(names))
    add_mask(vector, kept["seed"], names[own_id], 1)
    keys = dict(zip(kept["members"], kept["masking-keys"], strict=True))
    private = key_of(kept["masking"])
    for member in asked.members:
        seed, common = shared_seed(private, keys[member]), names[member] & names[own_id]
        add_mask(vector, seed, common, pair_sign(own_id, member))
    kept |= {
        "stage": _HAS_MASKED,
        "received-from": list(shares),
        "received": list(shares.values()),
        "plans": [*asked.plans, plan.to_json()],
        "plan-of": [*asked.plan_of, len(asked.plans)],
        "plan-members": [*asked.members, own_id],
        "head": sorted(after.head),
    }
    state[_STATE] = ConfigRecord(kept)
    return vector


def with_unchosen(after: Adapter, before: Adapter, chosen: TrainPlan, plan: TrainPlan) -> Adapter:
    """Return an upload with all that a client could have chosen, so that its choice is hidden.

    Parameters
    ----------
    after
        The components that it chose, under the plan ``chosen``.
    before
        All that it could choose under ``plan``, as received.
    """
    if plan.choice is None:
        return after
    modules = {}
    for name, factors in after.modules.items():
        slots = [plan.modules[name].trainable.index(i) for i in chosen.modules[name].trainable]
        modules[name] = before.modules[name].replace(slots, factors)
    return Adapter(modules, after.head)


def _encoded(
    asked: AskMasked, plan: TrainPlan, after: Adapter, before: Adapter, members: int
) -> dict[str, NDArray[np.uint32]]:
    """Return the weighted change as whole numbers, and the own weights behind it, if any."""
    for share in (asked.share, asked.head_share):
        if not 0 < share <= 1:
            raise SecureSumError(f"a weight of {share:g}, expected above 0 and at most 1")
    own = product_norms(after, before, plan.own_weight) if plan.own_weight is not None else {}
    values = pieces_of(change_of(after, before), plan)
    values |= {piece: np.array([own[module]]) for module, piece in weight_names(plan).items()}
    shares = OwnShares(asked.share, asked.head_share, own).by_piece(plan, values)
    return Rounding(asked.largest, members).encode(values, shares)


def open_sum(state: RecordDict, asked: AskUnmask) -> Unmask:
    """Return the shares that open the sum of those whose vector came; once in a round.

    Raises
    ------
    SecureSumError
        If the sum would be one over too few, or a member is said to be there and missing.
    """
    kept = _kept(state, asked.server_round, _HAS_MASKED)
    there, missing = asked.there, asked.missing
    members = sorted(kept["plan-members"])
    if sorted([*there, *missing]) != members:
        raise SecureSumError("the members of the sum are not those of the round")
    if len(there) < kept["threshold"]:
        raise SecureSumError(f"{len(there)} of {len(members)} members are too few for a sum")
    plans = [TrainPlan.from_json(text) for text in kept["plans"]]
    numbers = dict(zip(kept["plan-members"], kept["plan-of"], strict=True))
    check_members(_of_plan(plans[numbers[member]], kept["head"]) for member in there)
    del state[_STATE]
    shares = {
        member: share_keys_plaintext_separate(text)[2:]
        for member, text in zip(kept["received-from"], kept["received"], strict=True)
    }
    return Unmask(there, [shares[m][0] for m in there], missing, [shares[m][1] for m in missing])


def _kept(state: RecordDict, server_round: int, stage: int) -> dict[str, Any]:
    """Return what the node keeps of a round in which it has come just so far."""
    record = state.get(_STATE)
    kept = dict(record) if isinstance(record, ConfigRecord) else {}
    if (kept.get("round"), kept.get("stage")) != (server_round, stage):
        raise SecureSumError("a message of a secure sum out of its turn")
    return kept


def _of_plan(plan: TrainPlan, head: list[str]) -> Names:
    return piece_names(plan, head if plan.uploads_head else ())


def _names(asked: AskMasked, plan: TrainPlan, own_id: int, after: Adapter) -> Mapping[int, Names]:
    """Return the pieces that each member uploads, this node included."""
    head = sorted(after.head)
    others = {member: _of_plan(other, head) for member, other in plans_of(asked).items()}
    return {**others, own_id: _of_plan(plan, head)}


def _check_known(kept: Mapping[str, Any], names: Mapping[int, Names]) -> None:
    if not set(names) <= set(kept["members"]) or len(names) < kept["threshold"]:
        raise SecureSumError(f"{len(names)} members of {len(kept['members'])} have shared secrets")


def _decrypted(kept: Mapping[str, Any], own_id: int, asked: AskMasked) -> dict[int, bytes]:
    """Return the shares that this node holds, by member: its own, and those the others sent it."""
    private = key_of(kept["encryption"])
    keys = dict(zip(kept["members"], kept["encryption-keys"], strict=True))
    shares = {own_id: kept["own"]}
    for member, encrypted in zip(asked.members, asked.encrypted, strict=True):
        try:
            text = decrypt(shared_seed(private, keys[member]), encrypted)
        except (InvalidToken, InvalidSignature) as error:
            raise SecureSumError("a share cannot be decrypted") from error
        if share_keys_plaintext_separate(text)[:2] != (member, own_id):
            raise SecureSumError("a share is from another member, or for another one")
        shares[member] = text
    return shares
