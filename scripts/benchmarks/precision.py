"""Time a training step with the base model's own dropout, without it, and in bf16."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from torch import Tensor

from benchmarks.timing import DisagreementError, Timing, time_in_turn
from benchmarks.training import OURS, Case, Client, gradients_of, job, make_client
from hafl_app.training.settings import TrainOptions

LOSS_BOUND, GRADIENT_BOUND = 1e-3, 0.05
"""Most that loss and gradients of a batch may differ in bf16, as a share of float32's norm."""

WITH_DROPOUT, FP32, BF16 = "fp32, base's dropout", "fp32", "bf16"
WAYS: Final[Mapping[str, tuple[str, bool]]] = {
    WITH_DROPOUT: ("fp32", True),
    FP32: ("fp32", False),
    BF16: ("bf16", False),
}
"""Precision and the base model's own dropout of each way."""


def clients(
    folder: Path | None, layers: int | None, steps: int, batch_size: int
) -> dict[str, Client]:
    """Return a client for each way, with the same texts and the same base model in each.

    Parameters
    ----------
    folder
        See `make_client`.
    layers
        Layers of the base model that are kept; None is all.
    """
    return {
        way: make_client(
            folder,
            steps,
            TrainOptions(batch_size=batch_size, precision=precision),
            num_layers=layers,
            dropout=dropout,
        )
        for way, (precision, dropout) in WAYS.items()
    }


def compare(ways: Mapping[str, Client], case: Case, repeats: int) -> dict[str, Timing]:
    """Check what bf16 rounds, then time the steps of every way in turn, in CPU time.

    Returns
    -------
    dict of str to Timing
        Seconds per step, of a whole training divided by its steps.

    Raises
    ------
    DisagreementError
        See `check_rounding`.
    """
    check_rounding(ways[FP32], ways[BF16], case)
    jobs = {way: job(client, case, OURS) for way, client in ways.items()}
    timings = time_in_turn(jobs, repeats, clock=time.process_time, patience_s=60.0)
    return {
        way: Timing(tuple(seconds / ways[way].steps for seconds in timing.seconds))
        for way, timing in timings.items()
    }


def check_rounding(whole: Client, rounded: Client, case: Case) -> tuple[float, float]:
    """Compare loss and gradients of a batch; return the largest differences, by float32's norm.

    Raises
    ------
    DisagreementError
        If the loss differs by more than 0.1 %, or the gradients by more than 5 % of the norm.
    """
    (loss, gradients), (other_loss, others) = (_of_a_batch(c, case) for c in (whole, rounded))
    errors = (
        float((other_loss - loss).abs() / loss.abs()),
        float((others - gradients).norm() / gradients.norm()),
    )
    for what, error, bound in zip(
        ("loss", "gradients"), errors, (LOSS_BOUND, GRADIENT_BOUND), strict=True
    ):
        if not error <= bound:
            raise DisagreementError(
                f"{case.name}: in bf16 the {what} differ by {error:.2g} of the norm, expected at "
                f"most {bound:g}"
            )
    return errors


def _of_a_batch(client: Client, case: Case) -> tuple[Tensor, Tensor]:
    model, rows = client.model, np.arange(min(16, len(client.texts.labels)))
    model.load(case.adapter(model), case.plan(model))
    model.eval()
    with model.computing(client.options.precision):
        loss = model.loss(model.batch(client.texts, rows))
    return gradients_of(loss, list(model.trainable_factors().values()))
