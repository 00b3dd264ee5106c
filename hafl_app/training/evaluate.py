"""Scores of a classifier on labelled text."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from torch import nn

from hafl_app.lowrank.factors import Adapter
from hafl_app.training.batches import Examples, evaluation_batches, make_batch
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.device import autocast

_BATCH_SIZE = 128


@dataclass(frozen=True)
class Scores:
    """Accuracy and macro F1 in [0, 1], mean cross entropy in nats, and on how many texts."""

    accuracy: float
    macro_f1: float
    loss: float
    num_examples: int

    def named(self, phase: str) -> dict[str, float]:
        """Return the metrics as ``phase/name``."""
        return {
            f"{phase}/accuracy": self.accuracy,
            f"{phase}/macro-f1": self.macro_f1,
            f"{phase}/loss": self.loss,
        }


@torch.inference_mode()
def predict_logits(
    classifier: LoraClassifier, examples: Examples, precision: str = "auto"
) -> NDArray[np.float32]:
    """Return logits of shape ``(rows, num_labels)``, in the order of the rows."""
    classifier.eval()
    rows_seen, chunks = [], []
    for rows in evaluation_batches(examples, _BATCH_SIZE):
        batch = make_batch(examples, rows, classifier.device)
        with autocast(classifier.device, precision):
            logits = classifier(batch.input_ids, batch.attention_mask)
        rows_seen.append(rows)
        chunks.append(logits.float().cpu().numpy())
    sorted_logits = np.concatenate(chunks)
    logits_by_row = np.empty_like(sorted_logits)
    logits_by_row[np.concatenate(rows_seen)] = sorted_logits
    return logits_by_row


def evaluate(classifier: LoraClassifier, examples: Examples, precision: str = "auto") -> Scores:
    """Score the classifier with the factors and head that it holds now.

    Raises
    ------
    ValueError
        If there is no example.
    """
    labels = examples.labels
    if len(labels) == 0:
        raise ValueError("nothing to evaluate on: no example")
    logits = torch.from_numpy(predict_logits(classifier, examples, precision))
    predicted = logits.argmax(1).numpy()
    return Scores(
        accuracy=float(np.mean(predicted == labels)),
        macro_f1=float(f1_score(labels, predicted, average="macro", zero_division=0)),
        loss=nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item(),
        num_examples=len(labels),
    )


def adapter_evaluator(
    classifier: LoraClassifier, precision: str = "auto"
) -> Callable[[Adapter, Examples], Scores]:
    """Return a function that scores whole adapters one after another in one resident model."""

    def score(adapter: Adapter, examples: Examples) -> Scores:
        classifier.load_whole(adapter)
        return evaluate(classifier, examples, precision)

    return score
