"""Baseline of the training benchmarks: a plain PEFT model in Hugging Face's `Trainer`."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.training.batches import Examples
from hafl_app.training.causal import IGNORED
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.settings import TrainOptions

_TRAINED, _FROZEN = "default", "frozen"
Row = dict[str, Tensor]


def is_installed() -> bool:
    """Whether `accelerate` is installed, without which `Trainer` refuses to work."""
    return importlib.util.find_spec("accelerate") is not None


class PlainPeft(nn.Module):
    """A base model with PEFT's adapters as it injects them, and perhaps a head.

    Parameters
    ----------
    base
        The base model without adapters.
    head
        From mean-pooled tokens to logits; None for a causal language model, whose loss is its own.
    """

    def __init__(self, base: nn.Module, head: nn.Module | None, adapter: Adapter, plan: TrainPlan):
        super().__init__()
        self.peft = _with_adapters(base, adapter, plan)
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the mean loss as `Trainer` wants it."""
        if self.head is None:
            causal = self.peft(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            return {"loss": causal.loss}
        hidden = self.peft(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        return {"loss": nn.functional.cross_entropy(logits.float(), labels)}

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Return the trained ``(lora_A, lora_B)`` of every adapted layer, in the model's order."""
        layers: list[Any] = [m for m in self.peft.modules() if isinstance(m, LoraLayer)]
        return [(m.lora_A[_TRAINED].weight, m.lora_B[_TRAINED].weight) for m in layers]


def _with_adapters(base: nn.Module, adapter: Adapter, plan: TrainPlan) -> Any:
    """Inject the trained components and, as an adapter of its own, the frozen ones."""
    trained, frozen = {}, {}
    for name, module in plan.modules.items():
        trained[name] = adapter.modules[name].select(module.trainable_slots)
        frozen[name] = adapter.modules[name].select(module.frozen_slots)
    whole: Any = base
    model: Any = get_peft_model(whole, _config(trained), adapter_name=_TRAINED)
    _copy_into(model, trained, _TRAINED)
    if any(factors.rank for factors in frozen.values()):
        model.add_adapter(_FROZEN, _config(frozen))
        model.base_model.set_adapter([_TRAINED, _FROZEN])
        _copy_into(model, frozen, _FROZEN)
        for name, parameter in model.named_parameters():
            if f".{_FROZEN}." in name:
                parameter.requires_grad_(False)
    return model


def _config(factors: Mapping[str, LoraFactors]) -> LoraConfig:
    rank = max(f.rank for f in factors.values())
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors))


@torch.no_grad()
def _copy_into(model: Any, factors: Mapping[str, LoraFactors], name: str) -> None:
    layers: dict[str, Any] = dict(model.base_model.model.named_modules())
    for module, update in factors.items():
        layers[module].lora_A[name].weight.copy_(update.lora_A)
        layers[module].lora_B[name].weight.copy_(update.lora_B)


def trainer_job(
    model: nn.Module, rows: Sequence[Row], options: TrainOptions, pad_to: int | None = None
) -> Callable[[], None]:
    """Return one pass over the rows by `Trainer`, in its usual order: shuffled.

    Parameters
    ----------
    options
        Batch size, learning rate and precision; everything else is as `Trainer` has it.
    pad_to
        Length of every batch; None pads to a batch's longest row.
    """
    device = next(model.parameters()).device

    def run() -> None:
        with TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=options.batch_size,
                num_train_epochs=1,
                learning_rate=options.learning_rate,
                bf16=options.precision == "bf16",
                use_cpu=device.type == "cpu",
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            data: Any = rows
            collate = partial(padded, length=pad_to)
            trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data)
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    return run


def rows_of(model: LoraModel, examples: Examples) -> list[Row]:
    """Return examples as `Trainer` takes them: ``input_ids`` and ``labels`` without padding."""
    rows = []
    for index in range(len(examples.labels)):
        batch = model.batch(examples, np.array([index]))
        input_ids, _ = batch.inputs
        rows.append({"input_ids": input_ids[0].cpu(), "labels": batch.labels[0].cpu()})
    return rows


def padded(rows: Sequence[Row], length: int | None = None) -> Row:
    """Return rows as a batch, padded on the right to ``length`` or to the longest of them."""
    ids = [row["input_ids"] for row in rows]
    width = length or max(len(row) for row in ids)
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": _stacked(ids, width, 0),
        "attention_mask": _stacked([torch.ones_like(row) for row in ids], width, 0),
        "labels": torch.stack(labels) if labels[0].ndim == 0 else _stacked(labels, width, IGNORED),
    }


def _stacked(rows: Sequence[Tensor], width: int, padding: int) -> Tensor:
    fill = nn.functional.pad
    return torch.stack([fill(row, (0, width - len(row)), value=padding) for row in rows])
