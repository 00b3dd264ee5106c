"""A saved adapter, or a base model alone, scored by itself: on a test set, or client by client."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hafl_app.config.compose import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.data.combinations import IMAGES
from hafl_app.data.images import encode_images
from hafl_app.data.pairs import pairs_of
from hafl_app.data.sources import LabeledText, load_text
from hafl_app.data.text import EncodedText, encode, encode_pairs
from hafl_app.experiments.client_evaluation import score_clients
from hafl_app.experiments.evaluation_request import NO_ADAPTER, EvaluationRequest
from hafl_app.experiments.harness import check_tasks, run_tasks
from hafl_app.experiments.scored_rows import SHOWN, Subject, category_rows, client_rows, scores_of
from hafl_app.metrics import LOSS
from hafl_app.printable import printable
from hafl_app.run import build
from hafl_app.run.checks import check_base_alone
from hafl_app.training.adapter_files import load_adapter, read_adapter
from hafl_app.training.base_model import CAUSAL_LM, IMAGE_CLASSIFICATION, load_tokenizer
from hafl_app.training.device import resolve_device, threads
from hafl_app.training.prompts import load_pair_tokenizer

_NEEDED = {
    CAUSAL_LM: "prompts with answers",
    IMAGE_CLASSIFICATION: "labeled images",
    "classification": "labeled text",
}
_LONGEST_LINE = 2000


def score(request: EvaluationRequest) -> dict[str, Any]:
    """Score what is asked for, write it to ``output`` if there is one, and return it.

    Returns
    -------
    dict
        ``metrics`` by name, over ``scored`` of the ``rows`` of the test set; ``left_out`` has the
        number of the others by reason; ``generated`` how many answers were written, if any;
        ``categories`` the metrics of each category of the data; ``clients`` those of each client,
        see `hafl_app.experiments.client_evaluation`; ``tasks`` as ``lm-eval`` returns them; and
        what was scored.

    Raises
    ------
    ValueError
        In one line, if the adapter, its base model or the data are not there or do not fit.
    OSError
        If the output cannot be written.
    """
    settings = request.settings
    if request.tasks:
        check_tasks(request.tasks)
    subject = _base_alone(settings) if request.adapter == NO_ADAPTER else _adapted(request)
    subject = replace(subject, max_length=request.max_length or subject.max_length)
    _check_task(request, subject)
    subject.model.to(resolve_device(settings.client.device)).eval()
    facts = {
        "adapter": request.adapter,
        "round": subject.round,
        "base": subject.base.path,
        "random_weights": subject.base.random_weights,
        "dataset": settings.dataset.source,
        "max_length": subject.max_length,
    }
    with threads(settings.federation.server_threads or settings.client.num_threads):
        if request.by_client:
            result = facts | score_clients(request, subject)
        else:
            result = facts | _on_test_set(request, subject)
        if request.tasks:
            tasks = run_tasks(subject.model, subject.base, request.tasks, request.max_examples)
            result["tasks"] = tasks
    if request.output is not None:
        request.output.parent.mkdir(parents=True, exist_ok=True)
        request.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(result: Mapping[str, Any]) -> str:
    """Format the result of `score` as text, a line for each number."""
    after = "" if result["round"] is None else f", round {result['round']}"
    rows = {
        "adapter": f"{printable(result['adapter'])}{after}",
        "base model": _base_line(result),
        "held out" if "clients" in result else "test data": (
            f"{result['dataset']}, {result['scored']:,} of {result['rows']:,} rows"
        ),
    }
    if left_out := result["left_out"]:
        rows["left out"] = "; ".join(f"{count:,}: {why}" for why, count in left_out.items())
    if result.get("generated", result["scored"]) != result["scored"]:
        rows["answers"] = f"{result['generated']:,} were generated"
    metrics = result["metrics"]
    rows |= {m.title: m.text(metrics[m.name]) for m in SHOWN if m.name in metrics}
    rows |= category_rows(result.get("categories", {})) | client_rows(result.get("clients", {}))
    for task, scores in result.get("tasks", {}).items():
        # "acc,none" is a metric and the filter of answers before it; the rest describes the task.
        found = (f"{name} {value}" for name, value in scores.items() if "," in name)
        rows[printable(task)] = printable("; ".join(found), _LONGEST_LINE)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _base_line(result: Mapping[str, Any]) -> str:
    random = ["random weights"] if result["random_weights"] else []
    return ", ".join([*filter(None, [printable(result["base"])]), *random])


def _adapted(request: EvaluationRequest) -> Subject:
    folder = Path(request.adapter).expanduser()
    trusted = request.settings.model.trust_remote_code
    stored = read_adapter(folder, trust_remote_code=trusted)
    model = load_adapter(folder, trust_remote_code=trusted).model
    after = stored.facts.get("server_round")
    return Subject(model, stored.spec.base, stored.max_length, stored.label_names, after)


def _base_alone(settings: Settings) -> Subject:
    check_base_alone(settings)
    # Fresh factors change nothing: lora_B is 0.
    spec = build.model_spec(settings, 0)
    return Subject(spec.build(), spec.base, settings.dataset.max_length, (), None)


def _check_task(request: EvaluationRequest, subject: Subject) -> None:
    dataset, task = request.settings.dataset, subject.base.task
    kind = "labeled images" if dataset.source in IMAGES else "labeled text"
    kind = "prompts with answers" if dataset.has_answers else kind
    needed = _NEEDED[task]
    if kind != needed:
        raise SettingsError(
            f"dataset={dataset.source} has {kind}, and the model ({task}) needs {needed}"
        )
    if task != CAUSAL_LM and (request.generated or request.tasks):
        unfit = ", ".join((*request.generated, *request.tasks))
        raise SettingsError(f"{unfit}: for a {CAUSAL_LM} only, and the model's task is {task}")


def _text(request: EvaluationRequest, subject: Subject) -> LabeledText:
    source = request.settings.dataset
    if request.max_examples is not None:
        source = replace(source, max_test_examples=request.max_examples)
    if subject.base.task != CAUSAL_LM:
        source = replace(source, label_names=list(subject.label_names))
    return load_text(source)


def _on_test_set(request: EvaluationRequest, subject: Subject) -> dict[str, Any]:
    text = _text(request, subject)
    pairs = pairs_of(text.test, text.label_names) if subject.base.task == CAUSAL_LM else None
    rows = _encoded(subject, text) if LOSS.name in request.metrics else None
    result = {
        "rows": len(text.test),
        **scores_of(request, subject, rows, pairs, text.label_names),
    }
    result["left_out"] = _left_out(result, text, subject.max_length)
    return result


def _left_out(result: Mapping[str, Any], text: LabeledText, max_length: int) -> dict[str, int]:
    """Return how many rows of the test file were not scored, by reason; none of them 0."""
    counts = {
        "not among those that max_examples or dataset.max_test_examples draws": (
            text.num_read[1] - result["rows"]
        ),
        f"no room for an answer within {max_length} tokens (dataset.max_length)": (
            result["rows"] - result["scored"]
        ),
    }
    return {reason: count for reason, count in counts.items() if count > 0}


def _encoded(subject: Subject, text: LabeledText) -> EncodedText:
    columns = text.test.with_format(None)
    labels = columns["label"][:]
    if subject.base.task == IMAGE_CLASSIFICATION:
        return encode_images(columns["pixels"][:], labels)
    texts = columns["text"][:]
    if subject.base.task != CAUSAL_LM:
        tokenize = load_tokenizer(subject.base, subject.max_length)
        return encode(texts, labels, tokenize, None, "")
    pairs = load_pair_tokenizer(subject.base, subject.max_length)
    return encode_pairs(texts, columns["answer"][:], labels, pairs, None, "").with_answers()
