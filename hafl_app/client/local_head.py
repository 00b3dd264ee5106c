"""A client's own head between its messages, in Flower's context state: ``model.head=local``."""

from flwr.app import ArrayRecord, RecordDict

from hafl_app.lowrank.factors import Adapter

_LOCAL_HEAD = "local-head"


def with_local_head(adapter: Adapter, state: RecordDict) -> Adapter:
    """Return a received adapter with the client's own head, if it keeps one and none was sent."""
    if adapter.head or _LOCAL_HEAD not in state.array_records:
        return adapter
    return adapter.with_head(state.array_records[_LOCAL_HEAD].to_torch_state_dict())


def keep_local_head(state: RecordDict, adapter: Adapter) -> None:
    """Keep a trained head for the client's next message."""
    state[_LOCAL_HEAD] = ArrayRecord(dict(adapter.head))
