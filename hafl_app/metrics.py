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
_ALL: Final = (ACCURACY, MACRO_F1, LOSS, PERPLEXITY, TOKEN_ACCURACY, ROUGE_L, EXACT_MATCH)


@dataclass(frozen=True)
class Task:
    """The metrics of a task.

    Parameters
    ----------
    name
        As in the settings.
    primary
        Rounds and learning rates are chosen by it, but see `Choice`.
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


_UNBALANCED: Final = 1.5


@dataclass(frozen=True)
class Choice:
    """By what the best round is chosen: one metric, and among equals the lower loss.

    It is the task's primary metric. A classifier's rounds are chosen by macro F1 instead where the
    largest class has more than 1.5 times the share of a balanced one, since accuracy then rewards
    a model that says nothing else; and by the clients' macro F1, since the server does not know
    their classes' sizes. Not by loss, of which a single false one decides a mean.

    Parameters
    ----------
    metric
        That decides.
    phase
        ``validation`` or ``clients``: whose scores.
    largest_share
        Of a class in the validation rows, in [0, 1]; 0 where there are none, or no classes.
    """

    metric: Metric
    phase: str
    largest_share: float = 0.0

    @classmethod
    def by_validation(cls, task: Task, class_sizes: Iterable[int], num_classes: int) -> "Choice":
        """Return the choice by the server's validation rows.

        Parameters
        ----------
        class_sizes
            Rows of each class that occurs; ignored for a task without classes.
        num_classes
            Of the task, at least 1.
        """
        sizes = list(class_sizes)
        if task.second != MACRO_F1 or not sizes:
            return cls(task.primary, "validation")
        share = max(sizes) / sum(sizes)
        unbalanced = share * num_classes > _UNBALANCED
        return cls(MACRO_F1 if unbalanced else task.primary, "validation", share)

    @classmethod
    def by_clients(cls, task: Task) -> "Choice":
        """Return the choice by the clients' mean scores."""
        return cls(MACRO_F1 if task.second == MACRO_F1 else task.primary, "clients")

    @property
    def key(self) -> str:
        """The metric's name in records."""
        return self.metric.key(self.phase)

    def merit(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Return what the best round has most of; minus infinity where the score is unknown."""
        score, loss = (metrics.get(m.key(self.phase), math.nan) for m in (self.metric, LOSS))
        if not math.isfinite(score):
            return -math.inf, -math.inf
        return self.metric.merit(score), -loss if math.isfinite(loss) else -math.inf


def metric_named(name: str) -> Metric:
    """Return a metric by its name in records.

    Raises
    ------
    KeyError
        If there is none.
    """
    return {metric.name: metric for metric in _ALL}[name]


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


def worst_tenth(values: Iterable[float], metric: Metric) -> float:
    """Return the mean over the worst tenth of the clients, at least one; NaN of none.

    Parameters
    ----------
    values
        A client's score each.
    """
    ordered = sorted(values, key=metric.merit)
    worst = ordered[: math.ceil(len(ordered) / 10)]
    return sum(worst) / len(worst) if worst else math.nan


def spread_of(values: Sequence[float], metric: Metric) -> dict[str, float]:
    """Return ``mean``, ``worst_tenth``, ``worst`` and ``best`` of clients' scores, one at least.

    Every client counts the same, however many examples it has.
    """
    return {
        "mean": sum(values) / len(values),
        "worst_tenth": worst_tenth(values, metric),
        "worst": min(values, key=metric.merit),
        "best": max(values, key=metric.merit),
    }


def weighted_mean(clients: Sequence[Mapping[str, float]], name: str, weight: str) -> float:
    """Return the mean of a metric over the clients that report it; NaN without weights."""
    reporting = [one for one in clients if name in one]  # a node may withhold it
    total = sum(one[weight] for one in reporting)
    if not total:
        return math.nan
    return sum(one[name] * one[weight] for one in reporting) / total
