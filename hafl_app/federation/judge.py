"""Judging a reply before it counts: anything but what its plan asked for is refused."""

from collections.abc import Mapping

import numpy as np
from flwr.app import Message

from hafl_app.federation.profiles import NodeProfile
from hafl_app.federation.records import (
    METRICS,
    NUM_EXAMPLES,
    AdapterArrays,
    RecordError,
    read_adapter,
)
from hafl_app.plan import TrainPlan


class ReplyError(ValueError):
    """A reply that must not count, with the reason."""


def read_metrics(reply: Message, profile: NodeProfile) -> dict[str, float]:
    """Return a reply's metrics by name, ``num-examples`` checked.

    Raises
    ------
    ReplyError
        If the reply is an error, has no metrics, or claims an impossible number of examples.
    """
    if reply.has_error():
        raise ReplyError(reply.error.reason or f"error {reply.error.code}")
    record = reply.content.metric_records.get(METRICS)
    if record is None:
        raise ReplyError("no metrics in the reply")
    metrics = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
    examples = metrics.get(NUM_EXAMPLES, float("nan"))
    if not 0 < examples <= max(profile.num_examples, 1):
        raise ReplyError(
            f"{NUM_EXAMPLES} is {examples}, the profile said 1 to {profile.num_examples}"
        )
    return metrics


def read_update(
    reply: Message, plan: TrainPlan, head: Mapping[str, tuple[int, ...]]
) -> AdapterArrays:
    """Return the adapter of a reply that does what its plan asked for.

    Parameters
    ----------
    plan
        What the node was asked to do.
    head
        Shapes of the head's tensors that it must upload; empty if the head does not travel.

    Raises
    ------
    ReplyError
        Naming the module or tensor, what came and what was expected.
    """
    try:
        update = read_adapter(reply.content)
    except RecordError as error:
        raise ReplyError(str(error)) from error
    if set(update.modules) != set(plan.modules):
        odd = sorted(set(update.modules) ^ set(plan.modules))
        raise ReplyError(f"modules differ from the plan's: {odd[:3]}")
    for name, (lora_A, lora_B) in update.modules.items():
        trained = len(plan.modules[name].trainable)
        allowed = plan.tail.uploads(trained) if plan.tail is not None else {trained}
        if lora_A.shape[0] not in allowed:
            ranks = " or ".join(map(str, sorted(allowed)))
            raise ReplyError(f"{name}: rank {lora_A.shape[0]}, the plan allows {ranks}")
        if not (np.isfinite(lora_A).all() and np.isfinite(lora_B).all()):
            raise ReplyError(f"{name}: factors that are not finite")
    shapes = {name: array.shape for name, array in update.head.items()}
    if shapes != dict(head):
        raise ReplyError(f"head {shapes}, expected {dict(head)}")
    if not all(np.isfinite(array).all() for array in update.head.values()):
        raise ReplyError("a head that is not finite")
    _check_scores(update, plan)
    return update


def _check_scores(update: AdapterArrays, plan: TrainPlan) -> None:
    if plan.importance == "none":
        return
    for name, module in plan.modules.items():
        expected = len(module.held if plan.probe_batches else module.trainable)
        scores = update.importance.get(name, np.zeros(0, np.float32))
        if len(scores) not in ({expected} if expected else {0}):
            raise ReplyError(f"{name}: {len(scores)} importance scores, expected {expected}")
        if not np.isfinite(scores).all() or (scores < 0).any():
            raise ReplyError(f"{name}: importance scores that are negative or not finite")


def check_shapes(update: AdapterArrays, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse factors for layers of another size.

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
