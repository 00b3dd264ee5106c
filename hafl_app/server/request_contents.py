"""Contents of requests: made once for equal plans, and completed with what is for one node."""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from flwr.app import ConfigRecord, RecordDict

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.number_formats import NumberFormat
from hafl_app.server.secure_sum import SecureSum
from hafl_app.training.adapter_arrays import to_arrays
from hafl_app.wire.message_size import content_size
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import (
    CONFIG,
    LABEL_NAMES,
    PARTITION_ID,
    PLAN,
    SERVER_ROUND,
    AdapterArrays,
    adapter_content,
    head_bytes,
    plan_record,
    with_correction,
)
from hafl_app.wire.secure_sum import SECURE, secure_record

Kept = TypeVar("Kept")
_MOST_KEPT = 16  # one a rank tier, as a rule; further ones are made again


@dataclass(frozen=True)
class RequestContent:
    """Content of a message, with its size, and the size of its head."""

    records: RecordDict
    num_bytes: int
    head_bytes: int


class Dispatches:
    """What a round sends: made once for all plans that hold the same components.

    Only the last few are kept, so that what is for single clients does not pile up.
    """

    def __init__(self, dispatch: Callable[[TrainPlan], Adapter], server_round: int) -> None:
        self._dispatch = dispatch
        self._config = ConfigRecord({SERVER_ROUND: server_round})
        self._sent: OrderedDict[object, Adapter] = OrderedDict()
        self._contents: OrderedDict[object, RecordDict] = OrderedDict()
        self._requests: deque[tuple[TrainPlan, RequestContent]] = deque(maxlen=_MOST_KEPT)

    def sent(self, plan: TrainPlan) -> Adapter:
        """Return the adapter that a plan's client receives."""
        return _kept(self._sent, _held(plan), lambda: self._dispatch(plan))

    def request(self, plan: TrainPlan) -> RequestContent:
        """Return the content for a plan: written and counted once for equal plans."""
        for known, made in self._requests:
            if known == plan:
                return made
        shared = _kept(self._contents, _held(plan), lambda: self._content(plan))
        content = RecordDict({**shared, PLAN: plan_record(plan)})
        made = RequestContent(content, content_size(content), head_bytes(content))
        self._requests.append((plan, made))
        return made

    def forget_contents(self) -> None:
        """Free the contents, once all requests are made: replies are read beside `sent` alone."""
        self._contents.clear()
        self._requests.clear()

    def _content(self, plan: TrainPlan) -> RecordDict:
        """Return a content with everything but the plan."""
        numbers: NumberFormat = "fp32" if plan.density == 1 else "sparse"
        arrays = AdapterArrays(*to_arrays(self.sent(plan)), numbers=numbers)
        return adapter_content(arrays, **{CONFIG: self._config})


def _held(plan: TrainPlan) -> object:
    """Return what decides the adapter that a plan's client receives."""
    held = ((name, m.held, m.own_lora_B) for name, m in plan.modules.items())
    return plan.head, plan.density, tuple(held)


def _kept(cache: OrderedDict[object, Kept], key: object, make: Callable[[], Kept]) -> Kept:
    """Return what is cached, or make it, and forget what was not asked for the longest."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > _MOST_KEPT:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def for_own_data(
    content: RequestContent, profile: NodeProfile, label_names: Sequence[str]
) -> RequestContent:
    """Add the partition number and label names that a node with its own data cannot know."""
    config = ConfigRecord(
        {
            **content.records.config_records[CONFIG],
            PARTITION_ID: profile.partition_id,
            LABEL_NAMES: list(label_names),
        }
    )
    records = RecordDict({**content.records, CONFIG: config})
    return replace(content, records=records, num_bytes=content_size(records))


def masked(content: RequestContent, secure: SecureSum, node_id: int) -> RequestContent:
    """Return a content with a client's part of a secure sum, and its size."""
    record = secure_record(secure.record_for(node_id))
    records = RecordDict({**content.records, SECURE: record})
    return replace(content, records=records, num_bytes=content_size(records))


def corrected(content: RequestContent, correction: Adapter | None) -> RequestContent:
    """Return a content with a correction, which is one client's, and its size."""
    if correction is None:
        return content
    arrays = AdapterArrays(*to_arrays(correction))
    records = with_correction(content.records, arrays)
    return RequestContent(records, content_size(records), head_bytes(records))
