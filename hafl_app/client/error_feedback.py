"""Error feedback: a client's rounding errors, kept between its messages in Flower's context state.

The engine keeps that state: the in-process engine restores it when a run is resumed, Flower's own
engines lose it with the run.
"""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, RecordDict

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.quantize import RoundingErrors
from hafl_app.plan import TrainPlan
from hafl_app.wire.arrays import Float32
from hafl_app.wire.records import ROUNDING_ERRORS, AdapterArrays
from hafl_app.wire.uploads import encode_upload

_COMPONENTS, _LORA_A, _LORA_B = "components/", "lora_A/", "lora_B/"


def encode_with_feedback(
    state: RecordDict,
    upload: Adapter,
    received: Adapter,
    plan: TrainPlan,
    importance: Mapping[str, Float32],
    seed: int,
) -> AdapterArrays:
    """Encode an upload; under a plan with ``error_feedback`` its rounding errors are kept.

    Parameters
    ----------
    state
        Of the client.
    upload, received, plan, importance, seed
        See `hafl_app.wire.uploads.encode_upload`.
    """
    kept = read_errors(state)
    arrays, errors = encode_upload(upload, received, plan, importance, kept, seed)
    if plan.error_feedback:
        write_errors(state, errors)
    return arrays


def read_errors(state: RecordDict) -> dict[str, RoundingErrors]:
    """Return the kept rounding errors by module; empty before the first rounded upload."""
    if ROUNDING_ERRORS not in state.array_records:
        return {}
    tensors = state.array_records[ROUNDING_ERRORS].to_torch_state_dict()
    names = [key.removeprefix(_COMPONENTS) for key in tensors if key.startswith(_COMPONENTS)]
    return {
        name: RoundingErrors(
            tuple(tensors[_COMPONENTS + name].tolist()),
            LoraFactors(tensors[_LORA_A + name], tensors[_LORA_B + name]),
        )
        for name in names
    }


def write_errors(state: RecordDict, errors: Mapping[str, RoundingErrors]) -> None:
    """Keep these rounding errors, by module, in place of the earlier ones."""
    tensors = {}
    for name, kept in errors.items():
        tensors[_COMPONENTS + name] = torch.tensor(kept.components, dtype=torch.int64)
        tensors[_LORA_A + name] = kept.errors.lora_A
        tensors[_LORA_B + name] = kept.errors.lora_B.contiguous()
    state[ROUNDING_ERRORS] = ArrayRecord(tensors)
