"""The base model's own dropout, switched off in its configuration and in its layers.

A frozen base model needs none of it to keep from overfitting, and without it attention takes
PyTorch's fused path. ``lora.lora_dropout``, before the trained factors, is another setting.
"""

from typing import Any, Final

from torch import nn

_NAME: Final = "drop"
"""In the name of every rate: ``hidden_dropout_prob``, ``resid_pdrop``, ``drop_path_rate``..."""


def without_dropout(config: Any) -> Any:
    """Set every dropout rate of a Transformers configuration, and of those in it, to 0, in place.

    A rate that is null stays so: it follows another one.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_diff_dict"):  # the configuration of a part of the model
            without_dropout(value)
        elif _NAME in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, 0.0)
    return config


def switch_off_dropout(model: nn.Module) -> None:
    """Switch off the dropout layers whose rate is no part of the configuration, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
