"""The kind of model that a task needs."""

from hafl_app.training.base_model import CAUSAL_LM, IMAGE_CLASSIFICATION
from hafl_app.training.causal import CausalSpec
from hafl_app.training.classifier import ClassifierSpec
from hafl_app.training.lora_model import LoraSpec
from hafl_app.training.settings import BaseSpec
from hafl_app.training.vision import ImageSpec


def lora_spec(
    base: BaseSpec,
    num_labels: int,
    target_modules: str | tuple[str, ...] = "all-linear",
    lora_dropout: float = 0.0,
    seed: int = 0,
) -> LoraSpec:
    """Return the identity of a model's weights before training, of the class for ``base.task``.

    Parameters
    ----------
    base
        The frozen base model.
    num_labels
        Classes; without meaning for a causal language model.
    target_modules, lora_dropout, seed
        As in `LoraSpec`.
    """
    if base.task == CAUSAL_LM:
        return CausalSpec(base, target_modules, lora_dropout, seed)
    kind = ImageSpec if base.task == IMAGE_CLASSIFICATION else ClassifierSpec
    return kind(base, num_labels, target_modules, lora_dropout, seed)
