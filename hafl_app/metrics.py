"""Metrics of each task: their names, and which direction is better.

A metric is recorded as ``phase/name``, for example ``validation/accuracy``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True)
class Metric:
    """Metric of a model, with its names and its better direction.

    Parameters
    ----------
    name
        On the wire and in records.
    title
        In reports.
    higher_is_better
        Which direction is better.
    is_share
        Whether it is in [0, 1] and shown in percent.
    unit
        Word before it on a narrow line; empty where it needs none.
    """

    name: str
    title: str
    higher_is_better: bool = True
    is_share: bool = True
    unit: str = ""

    def key(self, phase: str) -> str:
        """Return ``phase/name``."""
        return f"{phase}/{self.name}"

    def merit(self, value: float) -> float:
        """Return the value, negated where lower is better, so that higher is always better."""
        return value if self.higher_is_better else -value

    def text(self, value: float | None) -> str:
        """Return the value as text; ``-`` if there is none."""
        if value is None or not math.isfinite(value):
            return "-"
        return f"{value:.1%}" if self.is_share else f"{value:.2f}"

    def difference(self, better: float, worse: float) -> float:
        """Return the margin of the first value over the second; below 0 if it is worse."""
        return self.merit(better) - self.merit(worse)


ACCURACY: Final = Metric("accuracy", "accuracy")
MACRO_F1: Final = Metric("macro-f1", "macro F1")
LOSS: Final = Metric("loss", "loss", higher_is_better=False, is_share=False)
PERPLEXITY: Final = Metric("perplexity", "perplexity", False, False, "ppl")
TOKEN_ACCURACY: Final = Metric("token-accuracy", "token accuracy")
ROUGE_L: Final = Metric("rouge-l", "Rouge-L")
EXACT_MATCH: Final = Metric("exact-match", "exact match")


@dataclass(frozen=True)
class Task:
    """The metrics of a task.

    Parameters
    ----------
    name
        As in the settings.
    primary
        Rounds and learning rates are chosen by it.
    second
        Shown beside it.
    averaged
        Names of clients' metrics; the federation's are their means by number of examples.
    """

    name: str
    primary: Metric
    second: Metric
    averaged: tuple[str, ...]

    def of_clients(self, clients: Sequence[Mapping[str, float]], weight: str) -> dict[str, float]:
        """Return the federation's metrics from those of clients.

        The perplexity is that of the mean loss.

        Parameters
        ----------
        clients
            Metrics by name; a missing one makes the mean NaN.
        weight
            Name of the metric that weighs a client.
        """
        means = {name: weighted_mean(clients, name, weight) for name in self.averaged}
        return with_perplexity(means) if self.primary == PERPLEXITY else means


CLASSIFICATION: Final = Task("classification", ACCURACY, MACRO_F1, ("accuracy", "macro-f1", "loss"))
CAUSAL_LM: Final = Task("causal_lm", PERPLEXITY, TOKEN_ACCURACY, ("loss", "token-accuracy"))
IMAGE_CLASSIFICATION: Final = replace(CLASSIFICATION, name="image_classification")
TASKS: Final = {task.name: task for task in (CLASSIFICATION, CAUSAL_LM, IMAGE_CLASSIFICATION)}


def task_of(recorded: Iterable[str]) -> Task:
    """Return the task whose primary metric is among recorded names; classification without."""
    names = {key.rpartition("/")[2] for key in recorded}
    return next((task for task in TASKS.values() if task.primary.name in names), CLASSIFICATION)


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, infinite where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def with_perplexity(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with the perplexity of their loss."""
    return {PERPLEXITY.name: perplexity(metrics[LOSS.name]), **metrics}


def weighted_mean(clients: Sequence[Mapping[str, float]], name: str, weight: str) -> float:
    """Return the mean of a metric over the clients that report it; NaN without weights."""
    reporting = [one for one in clients if name in one]  # a node may withhold it
    total = sum(one[weight] for one in reporting)
    if not total:
        return math.nan
    return sum(one[name] * one[weight] for one in reporting) / total
