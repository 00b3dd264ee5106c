"""Scores of a model: on labeled text, or on prompts with answers."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hafl_app.heads.temperature import losses_by_temperature
from hafl_app.lowrank.factors import Adapter
from hafl_app.metrics import with_perplexity
from hafl_app.training.batches import Batch, Examples, evaluation_batches
from hafl_app.training.causal import IGNORED, LoraCausalLM
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.macro_f1 import macro_f1

_BATCH_SIZE = 64  # on a CPU a fifth faster than 128
_MOST_PADDING = 32  # tokens that a longer row may cost those before it, on a CPU
_LOGITS_AT_ONCE = 2**26  # of a language model: 256 MB in float32


class Scores(Protocol):
    """Scores of a model on some task."""

    @property
    def num_examples(self) -> int:
        """Number of scored texts."""

    def to_wire(self) -> dict[str, int | float]:
        """Return a node's report, by name; all of it is finite."""

    def named(self, phase: str) -> dict[str, float]:
        """Return the metrics as ``phase/name``."""


@dataclass(frozen=True)
class ClassificationScores:
    """Accuracy and macro F1 in [0, 1], mean cross entropy in nats, and on how many texts."""

    accuracy: float
    macro_f1: float
    loss: float
    num_examples: int

    def to_wire(self) -> dict[str, int | float]:
        """Return all scores by name."""
        return {
            "accuracy": self.accuracy,
            "macro-f1": self.macro_f1,
            "loss": self.loss,
            "num-examples": self.num_examples,
        }

    def named(self, phase: str) -> dict[str, float]:
        """Return the metrics as ``phase/name``."""
        return {
            f"{phase}/accuracy": self.accuracy,
            f"{phase}/macro-f1": self.macro_f1,
            f"{phase}/loss": self.loss,
        }


@dataclass(frozen=True, eq=False)
class AnswerRows:
    """Sums over the tokens of each answer, shape (rows,): what scores of any part are made of.

    Parameters
    ----------
    losses
        Cross entropy in nats, float64.
    right, tokens
        Tokens that the model holds for the most probable, and all of them; int64.
    """

    losses: NDArray[np.float64]
    right: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def select(self, rows: NDArray[np.bool_]) -> "AnswerRows":
        """Return some of the rows, by a mask of shape (rows,)."""
        return AnswerRows(self.losses[rows], self.right[rows], self.tokens[rows])

    def scores(self) -> "AnswerScores":
        """Return the scores over all tokens of these rows, of which there must be one."""
        tokens, right = int(self.tokens.sum()), int(self.right.sum())
        loss = float(self.losses.sum()) / tokens
        return AnswerScores(loss, right / tokens, tokens, len(self.tokens), self)


@dataclass(frozen=True)
class AnswerScores:
    """Scores over the tokens of all answers.

    Parameters
    ----------
    loss
        Mean cross entropy of a token in nats, given the prompt and the answer before it.
    token_accuracy
        Share of the tokens that the model holds for the most probable, in [0, 1].
    num_tokens, num_examples
        Tokens of the answers, and answers.
    rows
        The answers that they are made of, in the order of the rows; None where those are not kept.
    """

    loss: float
    token_accuracy: float
    num_tokens: int
    num_examples: int
    rows: AnswerRows | None = field(default=None, repr=False, compare=False)

    def to_wire(self) -> dict[str, int | float]:
        """Return all scores by name but the perplexity, which may be infinite."""
        return {
            "loss": self.loss,
            "token-accuracy": self.token_accuracy,
            "num-tokens": self.num_tokens,
            "num-examples": self.num_examples,
        }

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name, with the perplexity, ``exp(loss)``."""
        return with_perplexity({"loss": self.loss, "token-accuracy": self.token_accuracy})

    def named(self, phase: str) -> dict[str, float]:
        """Return the metrics as ``phase/name``."""
        return {f"{phase}/{name}": value for name, value in self.metrics().items()}


def scores_by_category(
    scores: Scores, labels: NDArray[np.int64], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the scores of each category's answers, from those of all, without another pass.

    Parameters
    ----------
    labels
        Category of each scored row, shape (rows,).
    names
        Of the categories.

    Returns
    -------
    dict
        Category, in the order of the names, to its metrics and ``num_examples``; categories
        without a row are left out. Empty for a classifier, whose macro F1 is over its classes, and
        where there is one category.
    """
    if not isinstance(scores, AnswerScores) or scores.rows is None or len(names) < 2:
        return {}
    found: dict[str, dict[str, float]] = {}
    for label, name in enumerate(names):
        if (mask := labels == label).any():
            its = scores.rows.select(mask).scores()
            found[name] = {**its.metrics(), "num_examples": its.num_examples}
    return found


def evaluate(model: LoraModel, examples: Examples, precision: str = "auto") -> Scores:
    """Score the model with the factors and head that it holds now.

    Returns
    -------
    Scores
        `AnswerScores` of a causal language model, else `ClassificationScores`.

    Raises
    ------
    ValueError
        If there is no example.
    """
    if len(examples.labels) == 0:
        raise ValueError("nothing to evaluate on: no example")
    if isinstance(model, LoraCausalLM):
        return _score_answers(model, examples, precision)
    return _score_classes(model, examples, precision)


@torch.inference_mode()
def predict_logits(
    model: LoraModel, examples: Examples, precision: str = "auto"
) -> NDArray[np.float32]:
    """Return a classifier's logits of shape ``(rows, num_labels)``, in the order of the rows."""
    model.eval()
    rows_seen, chunks = [], []
    for rows in scored_batches(model, examples):
        batch = model.batch(examples, rows)
        with model.computing(precision):
            logits = model(*batch.inputs)
        rows_seen.append(rows)
        chunks.append(logits.float().cpu().numpy())
    sorted_logits = np.concatenate(chunks)
    logits_by_row = np.empty_like(sorted_logits)
    logits_by_row[np.concatenate(rows_seen)] = sorted_logits
    return logits_by_row


def temperature_losses(model: LoraModel, examples: Examples, precision: str = "auto") -> Tensor:
    """Return a classifier's summed cross entropy at each of the temperatures that are tried.

    Of the head as it is now, taken to be at temperature 1, see `hafl_app.heads.temperature`.
    """
    logits = torch.from_numpy(predict_logits(model, examples, precision))
    return losses_by_temperature(logits, torch.from_numpy(examples.labels))


def _score_classes(model: LoraModel, examples: Examples, precision: str) -> ClassificationScores:
    labels = examples.labels
    logits = torch.from_numpy(predict_logits(model, examples, precision))
    predicted = logits.argmax(1).numpy()
    return ClassificationScores(
        accuracy=float(np.mean(predicted == labels)),
        macro_f1=macro_f1(labels, predicted),
        loss=nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item(),
        num_examples=len(labels),
    )


@torch.inference_mode()
def _score_answers(model: LoraCausalLM, examples: Examples, precision: str) -> AnswerScores:
    model.eval()
    count = len(examples.labels)
    sums = AnswerRows(np.zeros(count), np.zeros(count, np.int64), np.zeros(count, np.int64))
    for rows in _bounded_batches(model, examples):
        with model.computing(precision):
            losses, right, tokens = _row_sums(model, model.batch(examples, rows))
        sums.losses[rows] = losses.cpu().numpy()
        sums.right[rows] = right.cpu().numpy()
        sums.tokens[rows] = tokens.cpu().numpy()
    return sums.scores()


def _row_sums(model: LoraCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's cross entropy in float64, right predictions, and tokens of its answer."""
    logits, targets = model.predictions(batch)
    is_target = targets != IGNORED
    chosen, wanted = logits[is_target].float(), targets[is_target]
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    losses[is_target] = nn.functional.cross_entropy(chosen, wanted, reduction="none").double()
    is_right = is_target.clone()
    is_right[is_target] = chosen.argmax(1) == wanted
    return losses.sum(1), is_right.sum(1), is_target.sum(1)


def scored_batches(model: LoraModel, examples: Examples) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of all batches in which examples are scored."""
    # Elsewhere than on a CPU, tokens cost little beside the start of a batch.
    most_padding = _MOST_PADDING if model.device.type == "cpu" else math.inf
    return evaluation_batches(examples, _BATCH_SIZE, most_padding)


def _bounded_batches(model: LoraCausalLM, examples: Examples) -> Iterator[NDArray[np.int64]]:
    """Yield all rows in batches whose logits are bounded: a vocabulary may be large."""
    lengths, vocabulary = np.diff(examples.offsets), int(model.base.config.vocab_size)
    for rows in scored_batches(model, examples):
        longest = int(lengths[rows].max())
        size = max(1, _LOGITS_AT_ONCE // (longest * vocabulary))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def adapter_evaluator(
    model: LoraModel, precision: str = "auto"
) -> Callable[[Adapter, Examples], Scores]:
    """Return a function that scores whole adapters one after another in one resident model."""

    def score(adapter: Adapter, examples: Examples) -> Scores:
        model.load_whole(adapter)
        return evaluate(model, examples, precision)

    return score
