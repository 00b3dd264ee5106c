"""A saved adapter scored on the rows that each client of its run held out."""

from dataclasses import replace
from typing import Any

from hafl_app.config.compose import SettingsError
from hafl_app.data.federated import FederatedText
from hafl_app.experiments.evaluation_request import EvaluationRequest
from hafl_app.experiments.scored_rows import SHOWN, Subject, scores_of
from hafl_app.metrics import LOSS, PERPLEXITY, perplexity, spread_of, weighted_mean
from hafl_app.run import build
from hafl_app.training.base_model import CAUSAL_LM


def score_clients(request: EvaluationRequest, subject: Subject) -> dict[str, Any]:
    """Score the whole adapter on each client's held-out rows.

    In the run itself each client scores what the method sends it, at its own rank.

    Returns
    -------
    dict
        ``metrics``, means by number of rows; ``clients`` with the metrics of each as
        ``by_client``, and as ``spread`` mean, worst tenth, worst and best of them, where each
        client counts the same; ``scored`` of the ``rows`` that the clients hold out.

    Raises
    ------
    SettingsError
        If no client holds out a row.
    hafl_app.data.errors.DataError
        If the data cannot be read.
    """
    text = _text(request, subject)
    each, rows = [], 0
    for partition_id in range(text.num_partitions):
        found, held_out = _score_one(request, subject, text, partition_id)
        rows += held_out
        if found["scored"]:
            count = {"num_examples": found["scored"]}
            each.append({"partition_id": partition_id, **found["metrics"], **count})
    if not each:
        raise SettingsError(
            "by=client: no client of the run held out a row (dataset.holdout_fraction="
            f"{request.settings.dataset.holdout_fraction})"
        )
    shown = [metric for metric in SHOWN if metric.name in each[0]]
    metrics = {m.name: weighted_mean(each, m.name, "num_examples") for m in shown}
    if PERPLEXITY.name in metrics:
        metrics[PERPLEXITY.name] = perplexity(metrics[LOSS.name])
    spread = {m.name: spread_of([one[m.name] for one in each], m) for m in shown}
    scored = sum(one["num_examples"] for one in each)
    return {
        "rows": rows,
        "scored": scored,
        "metrics": metrics,
        "clients": {"spread": spread, "by_client": each},
        "left_out": {"no room for an answer, or not among max_examples": rows - scored}
        if rows > scored
        else {},
    }


def _text(request: EvaluationRequest, subject: Subject) -> FederatedText:
    settings = request.settings
    dataset = replace(settings.dataset, max_length=subject.max_length)
    num_clients = settings.federation.num_clients
    return build.federated_text(replace(settings, dataset=dataset), num_clients, subject.base)


def _score_one(
    request: EvaluationRequest, subject: Subject, text: FederatedText, partition_id: int
) -> tuple[dict[str, Any], int]:
    """Return a client's scores, and how many rows it holds out."""
    encoded = text.holdout(partition_id)
    pairs, held_out = None, len(encoded)
    if subject.base.task == CAUSAL_LM:
        pairs = text.holdout_pairs(partition_id)
        held_out = len(pairs.prompts)
    if not len(encoded):
        return {"scored": 0, "metrics": {}}, held_out
    if (most := request.max_examples) is not None:
        encoded = encoded.select(range(min(most, len(encoded))))
    rows = encoded if LOSS.name in request.metrics else None
    return scores_of(request, subject, rows, pairs, ()), held_out
