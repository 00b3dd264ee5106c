"""A base model with an adapter merged into its weights, as an ordinary Transformers folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from hafl_app.training.adapter_card import SavedAdapterError
from hafl_app.training.adapter_files import StoredAdapter
from hafl_app.training.base_model import hub_tokenizer, load_base
from hafl_app.training.locate import locate
from hafl_app.training.peft_format import task_type
from hafl_app.training.quantization.blocks import dequantize
from hafl_app.training.settings import BaseSpec
from hafl_app.training.tensor_files import write_tensors

HEAD_FILE: Final = "head.safetensors"
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merged_model(stored: StoredAdapter) -> Any:
    """Return the base model in float32, ``weight + lora_B lora_A`` in every adapted layer.

    The labels' names are in its configuration. With ``pooling=cls`` the head is the adapter's; with
    mean pooling there is none in the model, see `write_merged`.

    Raises
    ------
    hafl_app.training.locate.ModelError
        If the base model is not there.
    SavedAdapterError
        If the adapter does not fit it.
    """
    spec = stored.spec
    with torch.random.fork_rng(devices=[]):
        # The seed decides whatever the base's files do not hold, random weights among them.
        torch.manual_seed(spec.seed)
        # The files keep the dropout of the base model's configuration.
        model: Any = load_base(replace(spec.base, dropout=True), spec.num_labels)
        dequantize(model)  # merged into the weights that the factors were trained on
    try:
        with torch.no_grad():
            for name, factors in stored.adapter.modules.items():
                model.get_submodule(name).weight += factors.delta_weight()
        if task_type(spec.base) == "SEQ_CLS":
            spec.unadapted(model).load_state_dict(dict(stored.adapter.head))
    except (AttributeError, RuntimeError) as error:
        reason = str(error).replace("\n", " ")
        raise SavedAdapterError(f"the adapter does not fit its base model: {reason}") from error
    _finish_config(model, stored)
    return model


def _finish_config(model: Any, stored: StoredAdapter) -> None:
    if task_type(stored.spec.base) == "CAUSAL_LM":
        model.config.use_cache = True  # training turned it off
    else:
        model.config.id2label = dict(enumerate(stored.label_names))
        model.config.label2id = {name: i for i, name in enumerate(stored.label_names)}


def write_merged(folder: Path, stored: StoredAdapter, dtype: str) -> None:
    """Write model, tokenizer and, with mean pooling, the head beside them.

    Plain Transformers has no classifier with mean pooling over tokens and a linear head. There the
    folder is that of the encoder (``AutoModel``), and ``head.safetensors`` holds ``weight`` of
    shape ``(num_labels, hidden_size)`` and ``bias`` in float32.

    Parameters
    ----------
    folder
        An existing, empty one.
    dtype
        Of the weights: one of `DTYPES`. The sums are made in float32.
    """
    merged_model(stored).to(DTYPES[dtype]).save_pretrained(folder)
    if not stored.spec.base.is_without_files:
        hub_tokenizer(stored.spec.base).save_pretrained(folder)
    if task_type(stored.spec.base) == "FEATURE_EXTRACTION":
        write_tensors(folder / HEAD_FILE, stored.adapter.head)


def require_whole_base(base: BaseSpec, num_labels: int) -> None:
    """Refuse an adapter whose base model plain Transformers would build with other weights.

    With ``pooling=cls`` some base models' files lack a layer below the head, which then has random
    weights that follow from the run's seed and are in no adapter.

    Raises
    ------
    SavedAdapterError
        If there is such a layer.
    hafl_app.training.locate.ModelError
        If the base model is not there.
    """
    if base.random_weights or task_type(base) != "SEQ_CLS":
        return
    model, told = AutoModelForSequenceClassification.from_pretrained(
        locate(base),
        num_labels=num_labels,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=base.trust_remote_code,
    )
    head = {id(p) for p in _classifier(model).parameters()}
    odd = [n for n in told["missing_keys"] if id(model.get_parameter(n)) not in head]
    if odd:
        raise SavedAdapterError(
            f"the files of {base.path} hold no {sorted(odd)[0]}: its random weights are in no "
            "adapter, so export with --merge"
        )


def _classifier(model: Any) -> nn.Module:
    head: nn.Module = model.classifier
    return head
