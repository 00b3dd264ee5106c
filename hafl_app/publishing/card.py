"""The model card of an export, in the hub's format."""

import math
import re
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hafl_app.metrics import Metric, task_of
from hafl_app.printable import printable
from hafl_app.publishing.exported import Exported
from hafl_app.publishing.license import base_license
from hafl_app.publishing.run_facts import read_run
from hafl_app.publishing.sections import body
from hafl_app.training.adapter_files import read_adapter
from hafl_app.training.settings import BaseSpec

CARD_FILE: Final = "README.md"
_PIPELINES: Final = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "IMAGE_CLS": "image-classification",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_LIBRARIES: Final = {"peft": "peft", "merged": "transformers", "gguf": "llama.cpp"}
_SCORED_TASKS: Final = {k: v for k, v in _PIPELINES.items() if k != "FEATURE_EXTRACTION"}
_HUB_NAME: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_HUB_METRICS: Final = {"macro-f1": "f1", "token-accuracy": "accuracy"}  # others are called the same


def model_card(export: Exported, license_id: str | None) -> ModelCard:
    """Return the card of a folder: front matter for the hub, text for people.

    Parameters
    ----------
    license_id
        That of the base model, see `hafl_app.publishing.license.base_license`.
    """
    results = _results(export)
    dataset = export.run.setting("dataset", "hub")
    tags = ["lora"]
    tags += ["federated-learning", "flower"] if export.is_federated else []
    tags += ["gguf"] if export.form == "gguf" else []
    tags += ["random-weights"] if export.stored.spec.base.random_weights else []
    data = ModelCardData(
        base_model=hub_name(export.stored.spec.base),
        library_name=_LIBRARIES[export.form],
        license=printable(license_id) if license_id else None,
        datasets=[printable(dataset)] if dataset else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        pipeline_tag=_PIPELINES[export.kind],
        tags=tags,
        model_name=_listed_name(export) if results else None,
        eval_results=results or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body(export, license_id)}")


def add_card(*folders: Path) -> None:
    """Write the card of each saved adapter into its folder; nothing is downloaded for it.

    Parameters
    ----------
    folders
        Of one run, whose files are read once for all of them.

    Raises
    ------
    hafl_app.training.adapter_card.SavedAdapterError
        If one is none.
    """
    run = read_run(folders[0])
    for folder in folders:
        export = Exported(folder.name, read_adapter(folder), run)
        license_id = base_license(export.stored.spec.base, ask_hub=False)
        model_card(export, license_id).save(folder / CARD_FILE)


def hub_name(base: BaseSpec) -> str | None:
    """Return the base model's name on the hub; nothing for a folder of this machine.

    Nor for random weights in the shape of a model: the hub would list them under the real ones.
    """
    if base.random_weights or not base.path or Path(base.path).expanduser().exists():
        return None
    return base.path if is_hub_name(base.path) else None


def is_hub_name(text: str) -> bool:
    """Return whether a text can be the name of a repository on the hub."""
    return bool(_HUB_NAME.fullmatch(text))


def _listed_name(export: Exported) -> str:
    """Return the name beside the scores that the hub lists."""
    random = " (random weights)" if export.stored.spec.base.random_weights else ""
    return f"{printable(export.name)}{random}"


def _results(export: Exported) -> list[EvalResult]:
    """Return the test scores of what is in the folder, not of a larger adapter."""
    scores: dict[str, Any] = dict(export.stored.facts.get("metrics", {}))
    task = task_of(scores)
    if export.is_cut:
        known = {task.primary: export.measured_at_rank}
    else:
        known = {m: scores.get(m.key("test")) for m in (task.primary, task.second)}
    return [
        _result(export, metric, float(value))
        for metric, value in known.items()
        if value is not None and math.isfinite(value)
    ]


def _result(export: Exported, metric: Metric, value: float) -> EvalResult:
    source = printable(export.run.setting("dataset", "source") or "unknown")
    return EvalResult(
        task_type=_SCORED_TASKS.get(export.kind, "text-classification"),
        dataset_type=printable(export.run.setting("dataset", "hub") or source),
        dataset_name=source,
        dataset_split="test",
        metric_type=_HUB_METRICS.get(metric.name, metric.name),
        metric_name=metric.title,
        metric_value=round(value, 6),
    )
