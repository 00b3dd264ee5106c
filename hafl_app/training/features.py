"""Features of a classifier, what its output layer reads, and their sums over examples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hafl_app.heads.feature_sums import FeatureSums, limit_norm
from hafl_app.heads.linear_head import output_layer
from hafl_app.heads.projection import random_projection
from hafl_app.heads.settings import ClosedFormSettings
from hafl_app.training.batches import Examples
from hafl_app.training.evaluate import scored_batches
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_model import LoraModel


def sums_of(
    model: LoraModel,
    examples: Examples,
    settings: ClosedFormSettings,
    *,
    precision: str,
    seed: int,
) -> FeatureSums:
    """Return the sums over examples under the factors that the model holds, without dropout.

    They are added up in float64 on the model's device.

    Parameters
    ----------
    settings
        What is summed up, and how it is projected and bounded.
    precision
        As for `hafl_app.training.evaluate.evaluate`, whose features these are.
    seed
        Of the run, for the projection.

    Raises
    ------
    ModelError
        If the head has no linear output layer.
    """
    labels = torch.from_numpy(examples.labels)
    sums: FeatureSums | None = None
    for rows, features in _features(model, examples, precision):
        prepared = prepared_features(features, settings, seed)
        part = FeatureSums.of(
            prepared,
            labels[rows].to(prepared.device),
            model.num_classes,
            moments=settings.asks_for_moments,
        )
        sums = part if sums is None else sums + part
    if sums is None:
        raise ValueError("no example to sum features over")
    return sums.cpu()


def features_of(
    model: LoraModel, examples: Examples, settings: ClosedFormSettings, *, precision: str, seed: int
) -> Tensor:
    """Return the features of every example as they are summed up, ``(rows, features)``, float64."""
    rows_seen, parts = [], []
    for rows, features in _features(model, examples, precision):
        rows_seen.append(rows)
        parts.append(prepared_features(features, settings, seed).cpu())
    ordered = torch.empty_like(torch.cat(parts))
    ordered[torch.from_numpy(np.concatenate(rows_seen))] = torch.cat(parts)
    return ordered


def prepared_features(features: Tensor, settings: ClosedFormSettings, seed: int) -> Tensor:
    """Return features in float64, projected if the settings say so, and of bounded norm.

    Parameters
    ----------
    features
        Shape ``(rows, width)``, as the output layer reads them.
    """
    wide, width = features.double(), features.shape[1]
    if settings.projects(width):
        wide = wide @ random_projection(width, settings.size(width), seed).to(wide.device)
    return limit_norm(wide, settings.most_norm(width))


@torch.inference_mode()
def _features(
    model: LoraModel, examples: Examples, precision: str
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield rows of the examples, and what the output layer reads for them."""
    model.eval()
    with _reading(_output_layer(model)) as read:
        for rows in scored_batches(model, examples):
            batch = model.batch(examples, rows)
            with model.computing(precision):
                model(*batch.inputs)
            yield rows, read.pop()


@contextmanager
def _reading(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Note every input of a layer."""
    read: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        read.append(inputs[0])

    handle = layer.register_forward_pre_hook(note)
    try:
        yield read
    finally:
        handle.remove()


def _output_layer(model: LoraModel) -> nn.Module:
    head = model.head_module
    try:
        name = output_layer(head.state_dict(), model.num_classes)
    except ValueError as error:
        raise ModelError(f"model.head=closed_form: {error}") from error
    return head.get_submodule(name)
