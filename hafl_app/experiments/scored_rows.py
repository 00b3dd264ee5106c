"""Scores of a model on some rows, whole and by category, and the lines that show them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hafl_app.data.pairs import Pairs
from hafl_app.data.text import EncodedText
from hafl_app.experiments.evaluation_request import EvaluationRequest
from hafl_app.metrics import (
    ACCURACY,
    EXACT_MATCH,
    LOSS,
    MACRO_F1,
    PERPLEXITY,
    ROUGE_L,
    TOKEN_ACCURACY,
    Metric,
)
from hafl_app.printable import printable
from hafl_app.training.evaluate import evaluate, scores_by_category
from hafl_app.training.generate import GenerationOptions, score_generation
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.settings import BaseSpec

SHOWN: Final = (ACCURACY, MACRO_F1, LOSS, PERPLEXITY, TOKEN_ACCURACY, ROUGE_L, EXACT_MATCH)
"""The metrics that are shown, in this order."""

_MOST_LINES: Final = 20  # of categories, or of clients


@dataclass(frozen=True)
class Subject:
    """A model that is ready to be scored; ``round`` is None for a base model alone."""

    model: LoraModel
    base: BaseSpec
    max_length: int
    label_names: tuple[str, ...]
    round: int | None


def scores_of(
    request: EvaluationRequest,
    subject: Subject,
    rows: EncodedText | None,
    pairs: Pairs | None,
    label_names: Sequence[str],
) -> dict[str, Any]:
    """Score rows as far as it is asked for.

    Parameters
    ----------
    rows
        Those that have room for an answer; None where no loss is wanted.
    pairs
        The same rows and those without room as text; None of a classifier.
    label_names
        Classes, or categories of the pairs.

    Returns
    -------
    dict
        ``scored``, ``metrics``, ``categories`` if there are several, and ``generated``, how many
        answers were written, if any were wanted.
    """
    precision = request.settings.client.precision
    result: dict[str, Any] = {"scored": 0, "metrics": {}}
    categories: dict[str, dict[str, float]] = {}
    if rows is not None:
        scores = evaluate(subject.model, rows, precision)
        result["scored"] = len(rows)
        for name, value in scores.named("test").items():
            result["metrics"][name.removeprefix("test/")] = value
        categories = scores_by_category(scores, rows.labels, label_names)
    if request.generated and pairs is not None:
        options = GenerationOptions(
            subject.max_length,
            request.max_new_tokens,
            request.max_examples,
            precision=precision,
        )
        generated = score_generation(
            *(subject.model, subject.base, pairs.prompts, pairs.answers, options),
            pairs.categories if len(label_names) > 1 else (),
        )
        result["scored"] = result["scored"] or generated.num_examples
        result["generated"] = generated.num_examples
        result["metrics"] |= {name: generated.to_json()[name] for name in request.generated}
        for name, its in generated.categories().items():
            known = categories.setdefault(name, {"num_examples": its["num_examples"]})
            known |= {metric: its[metric] for metric in request.generated}
    return {**result, "categories": categories} if categories else result


def category_rows(categories: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Return a line for each category, the first 20 of them."""
    return _cut({f"  {printable(name, 60)}": its for name, its in categories.items()}, "categories")


def client_rows(clients: Mapping[str, Any]) -> dict[str, str]:
    """Return lines for mean and worst tenth of the clients, and for each, the first 20 of them."""
    if not clients:
        return {}
    spread = clients["spread"]
    metrics = [metric for metric in SHOWN if metric.name in spread]
    ends = {"mean of clients": "mean", "worst tenth": "worst_tenth"}
    shown = {
        title: ", ".join(f"{m.title} {m.text(spread[m.name][key])}" for m in metrics)
        for title, key in ends.items()
    }
    each = {f"  client {one['partition_id']}": one for one in clients["by_client"]}
    return shown | _cut(each, "clients")


def _cut(lines: Mapping[str, Mapping[str, float]], what: str) -> dict[str, str]:
    shown = {title: _line(its) for title, its in list(lines.items())[:_MOST_LINES]}
    if more := len(lines) - len(shown):
        shown["  ..."] = f"and {more} more {what}, all of them in output=FILE"
    return shown


def _line(scores: Mapping[str, float]) -> str:
    metrics: list[Metric] = [metric for metric in SHOWN if metric.name in scores]
    parts = [f"{metric.title} {metric.text(scores[metric.name])}" for metric in metrics]
    count = scores["num_examples"]
    return ", ".join([*parts, f"{count:,} row{'s' if count != 1 else ''}"])
