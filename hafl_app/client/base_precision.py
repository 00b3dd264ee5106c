"""Bits of each block of a node's frozen base model, with ``model.quantization=blockwise``."""

import itertools
import logging

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict

from hafl_app.client.rank_budget import NodeLimits
from hafl_app.config.compose import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.data.shares import Share
from hafl_app.run import build
from hafl_app.training.base_model import base_without_weights
from hafl_app.training.batches import training_batches
from hafl_app.training.device import threads
from hafl_app.training.lora_model import resident_model
from hafl_app.training.quantization.block_precision import allocate, salience
from hafl_app.training.quantization.blocks import block_bytes
from hafl_app.training.quantization.precisions import PRECISIONS

_LOGGER = logging.getLogger(__name__)
_RECORD = "base-precision"
_BATCHES = 8  # of a client's texts: means over some hundred texts hardly move any more


def base_precision(
    settings: Settings, limits: NodeLimits, rank: int, share: Share, state: RecordDict
) -> str:
    """Return the bits of each block of this node's base model, written as in a `BaseSpec`.

    They are chosen once and kept in the node's state; the server does not learn them.

    Parameters
    ----------
    rank
        This node's rank budget: training's memory beside the base model depends on it.
    share
        The data that the salience is measured on.
    state
        Of this node in the run.

    Raises
    ------
    SettingsError
        If there is no budget.
    hafl_app.training.quantization.block_precision.BaseMemoryError
        If the base model does not fit into it.
    """
    budget = _budget_of_blocks(settings, limits, rank, len(share.label_names))
    kept = state.config_records.get(_RECORD)
    if kept is not None and kept["budget"] == budget:
        return str(kept["precision"])
    sizes = block_bytes(_shapes(settings, len(share.label_names)))
    chosen = allocate(_saliences(settings, share), sizes, budget)
    _LOGGER.info("the base model's blocks: %s", ", ".join(chosen))
    precision = ",".join(chosen)
    state[_RECORD] = ConfigRecord({"budget": budget, "precision": precision})
    return precision


def _shapes(settings: Settings, num_labels: int) -> torch.nn.Module:
    return base_without_weights(build.model_spec(settings, num_labels).base, num_labels)


def _budget_of_blocks(settings: Settings, limits: NodeLimits, rank: int, num_labels: int) -> int:
    """Return the bytes that the linear layers of all blocks may take together."""
    fewest = build.step_memory(settings, num_labels)
    blocks = sum(sizes[PRECISIONS[0]] for sizes in block_bytes(_shapes(settings, num_labels)))
    if limits.memory_mb is not None:
        usable = limits.memory_mb * (1 - settings.ranks.memory_margin)
        return blocks + int(1e6 * (usable - fewest.needed_mb(rank)))
    if settings.model.memory_budget_mb is not None:
        return blocks + int(1e6 * settings.model.memory_budget_mb) - fewest.weights
    raise SettingsError(
        "model.quantization=blockwise needs a budget: model.memory_budget_mb, or memory-mb in this "
        "node's --node-config"
    )


def _saliences(settings: Settings, share: Share) -> list[float]:
    """Measure on the base model in the fewest bits, which a small device can hold."""
    model = build.model(settings, len(share.label_names), PRECISIONS[0])
    examples = share.train()
    batches = training_batches(
        examples, settings.client.batch_size, np.random.default_rng(settings.seed)
    )
    some = (model.batch(examples, rows) for rows in itertools.islice(batches, _BATCHES))
    with threads(settings.client.num_threads):
        measured = salience(model, some)
    resident_model.cache_clear()  # gone before the next one is loaded
    return measured
