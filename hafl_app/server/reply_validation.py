"""Validate replies: anything but what a plan asked for is rejected."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord
from numpy.typing import NDArray

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.metrics import ACCURACY, EXACT_MATCH, LOSS, MACRO_F1, ROUGE_L, TOKEN_ACCURACY
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_lists import format_bits
from hafl_app.plan_parts.number_formats import NUMBER_BYTES
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.faults import one_line
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import METRICS, NUM_EXAMPLES, STEPS, AdapterArrays, read_adapter
from hafl_app.wire.uploads import decode_upload

# What a reply may weigh above its numbers: generous, so that only impossible sizes are rejected.
_SIZE_SLACK, _FIXED_BYTES, _BYTES_PER_NAME = 1.5, 64 * 1024, 256
_LONGEST_QUOTE = 60  # characters
_SHARES = {m.name for m in (ACCURACY, MACRO_F1, TOKEN_ACCURACY, ROUGE_L, EXACT_MATCH)}
_LARGEST_LOSS = 1e6  # so that a mean of losses says something beside a false one


class ReplyError(ValueError):
    """A reply that must not count, with the reason in one line."""


def check_size(
    num_bytes: int,
    plan: TrainPlan,
    head: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, int]],
) -> None:
    """Reject a reply that is larger than its plan explains, before anything in it is unpacked.

    At most 1.5 times the bytes of the plan's factors in its numbers, and of head and scores in
    float32, plus 64 KiB and something for each name.

    Parameters
    ----------
    num_bytes
        Of the reply.
    plan, head, shapes
        As in `read_update`.

    Raises
    ------
    ReplyError
        With both sizes.
    """
    payload = NUMBER_BYTES["fp32"] * sum(math.prod(shape) for shape in head.values())
    payload += plan.upload_bytes(shapes)
    payload += NUMBER_BYTES["fp32"] * sum(_num_scores(plan, name) for name in plan.modules)
    names = [*plan.modules, *head]
    named = sum(_BYTES_PER_NAME + 2 * len(name.encode()) for name in names)
    limit = int(_SIZE_SLACK * payload) + named + _FIXED_BYTES
    if num_bytes > limit:
        raise ReplyError(f"{num_bytes} bytes, expected at most {limit} for this plan")


def read_metrics(reply: Message, profile: NodeProfile) -> dict[str, float]:
    """Return a reply's metrics by name, all of them finite and ``num-examples`` plausible.

    A loss that is not finite means that training failed, whatever the factors are. All
    metrics are counts, losses, durations or shares: none is negative, and no share above 1.

    Raises
    ------
    ReplyError
        If the reply is an error, has no metrics or one that is impossible, or claims a number of
        examples that is not whole, below 1 or above the profile's.
    """
    if reply.has_error():
        # A node writes this line: nothing that it holds may break the server's log.
        reason = one_line(reply.error.reason or "")
        raise ReplyError(reason or f"error {reply.error.code}")
    record = reply.content.get(METRICS)
    if not isinstance(record, MetricRecord):
        raise ReplyError(f"no {METRICS!r} in the reply; it has {_quote(sorted(reply.content))}")
    for name, value in record.items():
        if not (isinstance(value, int | float) and abs(value) <= sys.float_info.max):
            raise ReplyError(f"metric {_quote(name)} is {_quote(value)}, expected a finite number")
        most = 1 if name in _SHARES else _LARGEST_LOSS if name == LOSS.name else math.inf
        if not 0 <= value <= most:
            raise ReplyError(f"metric {_quote(name)} is {_quote(value)}, expected 0 to {most:g}")
    steps = record.get(STEPS, 0)
    if type(steps) is not int:
        raise ReplyError(f"{STEPS} is {_quote(steps)}, expected a whole number")
    examples, largest = record.get(NUM_EXAMPLES), max(profile.num_examples, 1)
    if type(examples) is not int or not 1 <= examples <= largest:
        raise ReplyError(f"{NUM_EXAMPLES} is {examples}, expected a whole number, 1 to {largest}")
    return {name: float(value) for name, value in record.items()}  # type: ignore[arg-type]


def read_update(
    reply: Message,
    plan: TrainPlan,
    head: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, int]],
) -> AdapterArrays:
    """Return the adapter of a reply that does what its plan asked for.

    With ``plan.upload`` other than ``fp32`` its factors are their change, in float32 all the same.
    A factor that the plan does not train has no features, see `completed`.
    Whether the numbers of factors and head are finite is left to `check_finite`.

    Parameters
    ----------
    plan
        Plan that the node was sent.
    head
        Shapes of the head's tensors that it must upload; empty if the head does not travel.
    shapes
        Module name to ``(out_features, in_features)``.

    Raises
    ------
    ReplyError
        Naming the module or tensor, the value that came and the expected one.
    """
    try:
        update = read_adapter(reply.content)
    except RecordError as error:
        raise ReplyError(one_line(str(error))) from error
    if update.numbers != plan.upload:
        raise ReplyError(f"factors in {update.numbers}, expected {plan.upload}")
    _check_names("modules", update.modules, plan.modules)
    plan = executed_plan(update, plan)
    _check_factors(update, plan)
    check_shapes(update, {n: plan.modules[n].uploaded_sides(shapes[n]) for n in update.modules})
    _check_ranks(update, plan)
    _check_bits(update, plan)
    _check_density(update, plan)
    update = decode_upload(update)
    _check_head(update, head)
    _check_scores(update, plan)
    return update


def executed_plan(update: AdapterArrays, plan: TrainPlan) -> TrainPlan:
    """Return the plan as the node has executed it: after its choice of components, if it had one.

    Raises
    ------
    ReplyError
        If the plan's rule cannot have chosen the components, or it has none and some are named.
    """
    if plan.choice is None and not update.components:
        return plan
    try:
        return plan.chosen(update.components)
    except ValueError as error:
        raise ReplyError(str(error)) from error


def check_finite(adapter: Adapter) -> None:
    """Reject an adapter that has a number which is not finite.

    Raises
    ------
    ReplyError
        Naming the tensor, how many there are in it, and the first.
    """
    for name, factors in adapter.modules.items():
        _check_finite(f"{name}: lora_A", factors.lora_A.numpy(force=True))
        _check_finite(f"{name}: lora_B", factors.lora_B.numpy(force=True))
    for name, tensor in adapter.head.items():
        _check_finite(f"head {name}", tensor.numpy(force=True))


def completed(upload: Adapter, before: Adapter, plan: TrainPlan) -> Adapter:
    """Return the adapter that a client meant by its upload, both factors of every module.

    Parameters
    ----------
    upload
        Its factors are changes unless ``plan.upload`` is ``fp32``; one that the plan does not
        train has no features, and becomes what was sent. Its head is no change.
    before
        What the same components were when they were sent.
    """
    if plan.upload != "fp32":
        upload = restored(upload, before.only(plan.uploaded_factors))
    return upload.filled(before)


def restored(change: Adapter, before: Adapter) -> Adapter:
    """Return the adapter that a client meant by this change of its factors.

    Parameters
    ----------
    change
        Its factors are changes, its head is not.
    before
        What the same components and factors were when they were sent.
    """
    modules = {}
    for name, factors in change.modules.items():
        sent = before.modules[name]
        lora_A = sent.lora_A.cpu().float() + factors.lora_A
        lora_B = sent.lora_B.cpu().float() + factors.lora_B
        modules[name] = LoraFactors(lora_A, lora_B)
    return Adapter(modules, change.head)


def check_shapes(update: AdapterArrays, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Reject factors for layers of another size.

    Parameters
    ----------
    shapes
        Module name to ``(out_features, in_features)``.

    Raises
    ------
    ReplyError
        Naming the module.
    """
    for name, (lora_A, lora_B) in update.modules.items():
        got = (lora_B.shape[0], lora_A.shape[1])
        if got != shapes[name]:
            raise ReplyError(f"{name}: factors of a {got} weight, expected {shapes[name]}")


def _check_names(kind: str, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing, unasked = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or unasked:
        raise ReplyError(
            f"{kind}: {len(missing)} missing {_quote(missing[:3])}, "
            f"{len(unasked)} not asked for {_quote(unasked[:3])}"
        )


def _check_factors(update: AdapterArrays, plan: TrainPlan) -> None:
    for name, (lora_A, lora_B) in update.modules.items():
        module = plan.modules[name]
        if lora_A.shape[1] and module.uploads == "B":
            raise ReplyError(f"{name}: lora_A is uploaded, the plan trains lora_B alone")
        if lora_B.shape[0] and module.uploads == "A":
            kept = "leaves lora_B with its node" if module.own_lora_B else "trains lora_A alone"
            raise ReplyError(f"{name}: lora_B is uploaded, the plan {kept}")


def _check_ranks(update: AdapterArrays, plan: TrainPlan) -> None:
    for name, (lora_A, _) in update.modules.items():
        trained = len(plan.modules[name].trainable)
        allowed = plan.tail.uploads(trained) if plan.tail is not None else {trained}
        if plan.upload == "mixed":
            allowed = {min(rank, plan.modules[name].num_uploaded) for rank in allowed}
        if lora_A.shape[0] not in allowed:
            ranks = " or ".join(map(str, sorted(allowed)))
            raise ReplyError(f"{name}: rank {lora_A.shape[0]}, expected {ranks}")


def _check_bits(update: AdapterArrays, plan: TrainPlan) -> None:
    for name, bits in update.bits.items():
        if bits != (expected := plan.modules[name].bits[: len(bits)]):
            got, asked = _quote(format_bits(bits)), format_bits(expected)
            raise ReplyError(f"{name}: bits {got}, expected {_quote(asked)}")


def _check_density(update: AdapterArrays, plan: TrainPlan) -> None:
    if plan.density == 1:
        return
    parts = [part for pair in update.modules.values() for part in pair]
    got, most = sum(map(np.count_nonzero, parts)), plan.kept_numbers(sum(p.size for p in parts))
    if got > most:
        raise ReplyError(f"{got} numbers that are not 0, expected at most {most}")


def _check_head(update: AdapterArrays, head: Mapping[str, tuple[int, ...]]) -> None:
    _check_names("head", update.head, head)
    for name, array in update.head.items():
        if array.shape != head[name]:
            raise ReplyError(f"head {name}: shape {array.shape}, expected {head[name]}")


def _num_scores(plan: TrainPlan, name: str) -> int:
    """Return the number of importance scores that the plan asks for in a module."""
    if plan.importance == "none":
        return 0
    module = plan.modules[name]
    return len(module.held if plan.probe_batches else module.trainable)


def _check_scores(update: AdapterArrays, plan: TrainPlan) -> None:
    expected = {n: count for n in plan.modules if (count := _num_scores(plan, n))}
    # A module of which nothing is measured may be named with no scores, or not at all.
    got = {name: scores for name, scores in update.importance.items() if len(scores)}
    _check_names("importance", got, expected)
    for name, scores in got.items():
        if len(scores) != expected[name]:
            raise ReplyError(f"{name}: {len(scores)} importance scores, expected {expected[name]}")
        _check_finite(f"{name}: importance", scores)
        if scores.min() < 0:
            raise ReplyError(f"{name}: importance of {scores.min()}, expected at least 0")


def _check_finite(what: str, array: NDArray[Any]) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        wrong = array[~finite]
        raise ReplyError(
            f"{what}: {wrong.size} of {array.size} numbers are not finite, the first is {wrong[0]}"
        )


def _quote(value: object) -> str:
    """Quote a node's text on one line, shortened."""
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
