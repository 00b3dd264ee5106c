"""A client's own lora_B, kept between its messages in Flower's context state.

For plans whose modules say ``own_lora_B``: the factor is trained and never travels. The engine
keeps the state: the in-process engine restores it when a run is resumed, Flower's own engines lose
it with the run.
"""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape
from hafl_app.plan import TrainPlan
from hafl_app.wire.records import OWN_LORA_B


def with_own_lora_B(
    state: RecordDict, received: Adapter, plan: TrainPlan, shapes: Mapping[str, ModuleShape]
) -> Adapter:
    """Return a received adapter with the client's own lora_B where the plan leaves it to it.

    A component that the client has not trained yet starts at 0, as LoRA does.

    Parameters
    ----------
    state
        Of the client.
    received
        Of such a module it has lora_A alone.
    shapes
        Sizes of the model's layers.
    """
    if not any(module.own_lora_B for module in plan.modules.values()):
        return received
    kept, modules = _kept(state), dict(received.modules)
    for name, module in plan.modules.items():
        if module.own_lora_B and name in shapes:
            lora_B = torch.zeros(shapes[name].out_features, len(module.held))
            own = kept.get(name, lora_B[:, :0])
            for slot, component in enumerate(module.held):
                if component < own.shape[1]:
                    lora_B[:, slot] = own[:, component]
            modules[name] = LoraFactors(modules[name].lora_A, lora_B)
    return Adapter(modules, received.head)


def keep_lora_B(state: RecordDict, trained: Adapter, plan: TrainPlan) -> None:
    """Keep the trained lora_B of the modules whose plan leaves it to the client.

    Parameters
    ----------
    state
        Of the client.
    trained
        The trainable components after training.
    """
    owned = {n: m.trainable for n, m in plan.modules.items() if m.own_lora_B and m.trainable}
    if not owned:
        return
    kept = _kept(state)
    for name, components in owned.items():
        after = trained.modules[name].lora_B
        own = kept.get(name, after[:, :0])
        missing = max(0, 1 + max(components) - own.shape[1])
        wider = torch.cat([own, own.new_zeros(len(own), missing)], dim=1)
        wider[:, list(components)] = after
        kept[name] = wider
    state[OWN_LORA_B] = ArrayRecord(kept)


def _kept(state: RecordDict) -> dict[str, Tensor]:
    """Return all components that the client has, by module, in the order of their indices."""
    if OWN_LORA_B not in state.array_records:
        return {}
    return dict(state.array_records[OWN_LORA_B].to_torch_state_dict())
