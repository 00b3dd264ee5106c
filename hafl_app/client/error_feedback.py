"""What rounding kept back of a client's uploads, between its messages: in Flower's context state.

The engine keeps that state: the in-process one gives it back to a run that goes on, Flower's own
lose it with the run.
"""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, RecordDict

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.quantize import RoundingErrors
from hafl_app.wire.records import ROUNDING_ERRORS

_COMPONENTS, _LORA_A, _LORA_B = "components/", "lora_A/", "lora_B/"


def read_errors(state: RecordDict) -> dict[str, RoundingErrors]:
    """Return what is kept back, by module; empty before the first rounded upload."""
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
    """Keep this until the next message, instead of what was kept before."""
    tensors = {}
    for name, kept in errors.items():
        tensors[_COMPONENTS + name] = torch.tensor(kept.components, dtype=torch.int64)
        tensors[_LORA_A + name] = kept.errors.lora_A
        tensors[_LORA_B + name] = kept.errors.lora_B.contiguous()
    state[ROUNDING_ERRORS] = ArrayRecord(tensors)
