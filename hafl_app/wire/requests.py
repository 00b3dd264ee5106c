"""Requests of the server, read from a message once and validated once."""

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, ConfigRecordValues, Message

from hafl_app.data.labels import label_fault
from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.training.adapter_arrays import from_arrays
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.records import (
    CONFIG,
    LABEL_NAMES,
    PARTITION_ID,
    SERVER_ROUND,
    config_of,
    read_adapter,
    read_correction,
    read_plan,
)
from hafl_app.wire.secure_sum import AskMasked, is_secure, read_secure

_LONGEST_QUOTE = 60  # characters


@dataclass(frozen=True)
class QueryRequest:
    """Request for a node's profile.

    Parameters
    ----------
    label_names
        The run's classes; None if a node with its own data is to name the classes in them.
    """

    label_names: tuple[str, ...] | None


@dataclass(frozen=True)
class TrainRequest:
    """Request to train a plan's components, or to evaluate the adapter under that plan.

    Parameters
    ----------
    server_round
        At least 0.
    plan
        What to train.
    adapter
        The components that the plan holds, and the head; float32. The tensors share the message's
        memory, so they must not be written to.
    label_names
        The run's classes; None if the node knows them.
    partition_id
        Number of the node in the run, at least 0; None if the node has its own.
    correction
        What is added to the gradients of the trainable components and of the head; None: nothing.
    secure
        The secure sum that the upload is a part of; None: it is uploaded as it is.
    """

    server_round: int
    plan: TrainPlan
    adapter: Adapter
    label_names: tuple[str, ...] | None
    partition_id: int | None
    correction: Adapter | None = None
    secure: AskMasked | None = None


def read_query(message: Message) -> QueryRequest:
    """Read a query.

    Raises
    ------
    RecordError
        If the class names are not a list of text, or none that a run can have.
    """
    return QueryRequest(_label_names(config_of(message.content, CONFIG)))


def read_request(message: Message) -> TrainRequest:
    """Read a request to train or to evaluate.

    Raises
    ------
    RecordError
        If a part is missing or malformed, or plan and adapter do not hold the same components.
    """
    content = message.content
    config = config_of(content, CONFIG)
    given = config.get(PARTITION_ID)
    request = TrainRequest(
        server_round=_number(SERVER_ROUND, config.get(SERVER_ROUND)),
        plan=read_plan(content),
        adapter=_adapter(message),
        label_names=_label_names(config),
        partition_id=None if given is None else _number(PARTITION_ID, given),
        correction=_correction(message),
        secure=read_secure(content, AskMasked) if is_secure(content) else None,
    )
    _check_held(request.plan.modules, request.adapter)
    if request.correction is not None:
        _check_correction(request.correction, request.plan, request.adapter)
    return request


def _correction(message: Message) -> Adapter | None:
    arrays = read_correction(message.content)
    if arrays is None:
        return None
    if arrays.numbers != "fp32":
        raise RecordError(f"the correction's numbers are {arrays.numbers}, expected fp32")
    return from_arrays(arrays.modules, arrays.head)


def _check_correction(correction: Adapter, plan: TrainPlan, adapter: Adapter) -> None:
    """Refuse a correction that is not of the plan's trainable factors and the head it trains."""
    trained = adapter.head if plan.uploads_head else {}
    expected = {f"head {name}": tuple(tensor.shape) for name, tensor in trained.items()}
    got = {f"head {name}": tuple(tensor.shape) for name, tensor in correction.head.items()}
    for name, module in plan.modules.items():
        sent = adapter.modules[name]
        sides = module.uploaded_sides((sent.out_features, sent.in_features))
        expected[name] = (len(module.trainable), *sides)
    for name, factors in correction.modules.items():
        got[name] = (factors.rank, factors.out_features, factors.in_features)
    for name in sorted({*expected, *got}):
        if got.get(name) != expected.get(name):
            raise RecordError(
                f"correction of {name!r}: {got.get(name, 'none')}, expected "
                f"{expected.get(name, 'none')}"
            )
    for name, tensor in correction.tensors().items():
        if not tensor.isfinite().all():
            raise RecordError(f"correction {name!r}: not all numbers are finite")


def _adapter(message: Message) -> Adapter:
    arrays = read_adapter(message.content)
    if arrays.numbers not in ("fp32", "sparse"):  # only uploads are rounded
        raise RecordError(f"the adapter's numbers are {arrays.numbers}, expected fp32 or sparse")
    return from_arrays(arrays.modules, arrays.head)


def _check_held(modules: Mapping[str, ModulePlan], adapter: Adapter) -> None:
    held = {name: len(module.held) for name, module in modules.items()}
    sent = {name: factors.rank for name, factors in adapter.modules.items()}
    for name in sorted({*held, *sent}):
        if held.get(name) != sent.get(name):
            raise RecordError(
                f"module {name!r}: the adapter has {sent.get(name, 'no')} components, the plan "
                f"{held.get(name, 'no')}"
            )


def _label_names(config: ConfigRecord) -> tuple[str, ...] | None:
    names = config.get(LABEL_NAMES)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecordError(f"config: {LABEL_NAMES!r} is not a list of text")
    labels = tuple(str(name) for name in names)
    if fault := label_fault(labels):  # they decide the size of the head
        raise RecordError(f"config: {LABEL_NAMES!r}: {fault}")
    return labels


def _number(key: str, value: ConfigRecordValues | None) -> int:
    if type(value) is not int or value < 0:
        raise RecordError(
            f"config: {key!r} is {repr(value)[:_LONGEST_QUOTE]}, expected a whole number from 0"
        )
    return value
