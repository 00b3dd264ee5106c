"""The text of a model card, section by section."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from hafl_app.metrics import Metric, task_of
from hafl_app.printable import markdown_text
from hafl_app.publishing.exported import Exported
from hafl_app.publishing.usage import base_title, gguf_usage, usage
from hafl_app.training.quantization.precisions import NOT_QUANTIZED

_MEGABYTE: Final = 1e6
_LONGEST_CELL: Final = 2000
_PHASES: Final = {
    "test": "test data",
    "validation": "validation data",
    "clients": "clients' held-out data",
}


def body(export: Exported, license_id: str | None) -> str:
    """Return a model card's text, without the front matter.

    Parameters
    ----------
    license_id
        That of the base model; `None` if not known.
    """
    sections = [_title(export), _use(export), _training(export)]
    sections += [_scores(export), _cut(export), _limitations(export, license_id)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(export: Exported) -> str:
    base = markdown_text(base_title(export.stored.spec.base))
    what = f"{base} with a merged adapter" if export.merged else f"Adapter of {base}"
    classes = export.stored.spec.num_labels
    rows = "images" if export.kind == "IMAGE_CLS" else "texts"
    does = (
        f"It sorts {rows} into {classes} classes." if classes else "It writes answers to prompts."
    )
    how = (
        f"trained with federated learning by the method {markdown_text(export.method)}: the data "
        "stayed with the clients"
        if export.is_federated
        else "trained on all data in one place, to compare with federated learning"
    )
    return f"# {what}\n\nLoRA of rank {export.rank}, {how}. {does}"


def _use(export: Exported) -> str:
    template = export.run.setting("dataset", "template")
    if export.form == "gguf":
        text = f"## Use\n\n{gguf_usage(export.stored.spec.base, template)}"
    else:
        code = usage(export.stored, export.name, merged=export.merged, template=template)
        text = f"## Use\n\n```python\n{code}```"
    if export.kind == "CAUSAL_LM" and export.form == "peft":
        text += f"\n\nIn the terminal, with what it was trained by:\n\n{_chat(export)}"
    if export.kind == "CAUSAL_LM" and template:
        text += (
            "\n\nThe prompt is the one of the training: put values for the names in braces, and "
            "leave out a paragraph whose names have none."
        )
    if export.kind == "FEATURE_EXTRACTION":
        text += (
            "\n\nTransformers has no classifier with mean pooling, so the head lies beside the "
            "encoder, in `head.safetensors`; should it report a new pooler, nothing reads that."
        )
    return text


def _chat(export: Exported) -> str:
    """Return the command that talks to the adapter, its base and its devices' ranks."""
    ranks = [str(rank) for rank in export.run.clients_by_rank if rank < export.rank]
    compared = ",".join(["base", *ranks, "adapter"])
    return f"```bash\nhafl chat {shlex.quote(export.name)} --compare {compared}\n```"


def _training(export: Exported) -> str:
    facts, run = export.stored.facts, export.run
    rows = {
        "base model": _base(export),
        "data": _data(export),
        "clients": _clients(export),
        "method": _method(export),
        "round": facts.get("server_round"),
        "seed": facts.get("seed"),
        "cut at": f"{export.stored.max_length} tokens",
        "bytes": _bytes(run.summary.get("bytes", {}).get("train", {})),
        "privacy": _privacy(export),
    }
    return "## Training\n\n" + _table(("", ""), [(k, v) for k, v in rows.items() if v is not None])


def _base(export: Exported) -> str:
    base = export.stored.spec.base
    words = [base_title(base)]
    words += [f"revision {base.revision}"] if base.revision else []
    words += [f"its first {base.num_layers} layers"] if base.num_layers else []
    if base.quantization != NOT_QUANTIZED:
        words.append(f"kept in {base.quantization} while training and for these scores")
    if note := export.stored.facts.get("base_weights"):
        words.append(f"its weights {note}")
    return ", ".join(words)


def _data(export: Exported) -> str | None:
    setting = export.run.setting
    if not (source := setting("dataset", "source")):
        return None
    words = [str(setting("dataset", "hub") or source)]
    kind = setting("partition", "kind")
    if kind == "dirichlet":
        words.append(f"label skew Dirichlet({setting('partition', 'dirichlet_alpha')})")
    elif kind and source != "on_device":
        words.append(f"partition {kind}")
    return ", ".join(words)


def _clients(export: Exported) -> str | None:
    counts = export.run.clients_by_rank
    if not counts:
        return None
    each = ", ".join(f"{count} of rank {rank}" for rank, count in counts.items())
    return f"{sum(counts.values())}: {each}"


def _method(export: Exported) -> str:
    strategy = export.stored.facts.get("strategy", {})
    settings = [f"{name}={value}" for name, value in strategy.items() if name != "_target_"]
    return f"{export.method}" + (f" ({', '.join(settings)})" if settings else "")


def _bytes(traffic: Mapping[str, Any]) -> str | None:
    if not traffic:
        return None
    down, up = (_mb(traffic[way]) for way in ("down", "up"))
    by_rank = sorted(traffic["by_rank"].items(), key=lambda item: int(item[0]))
    each = ", ".join(
        f"{_mb(t['bytes_down'] / t['exchanges'])} / {_mb(t['bytes_up'] / t['exchanges'])} at {rank}"
        for rank, t in by_rank
        if t["exchanges"]
    )
    return f"{down} down, {up} up; of one training, down / up at rank: {each}"


def _mb(number: float) -> str:
    return f"{number / _MEGABYTE:.3g} MB"


def _privacy(export: Exported) -> str | None:
    kind = export.run.setting("privacy", "kind")
    if kind is None:
        return None
    if kind == "none":
        if export.run.setting("privacy", "secure_aggregation"):
            return "uploads were masked and summed; no noise was added"
        return "none: no noise was added"
    epsilon = export.stored.facts.get("metrics", {}).get("privacy/epsilon")
    words = f"{kind}, delta {export.run.setting('privacy', 'delta')}"
    return f"{words}, epsilon {epsilon:.3g}" if epsilon is not None else words


def _scores(export: Exported) -> str:
    scores = export.stored.facts.get("metrics", {})
    task = task_of(scores)
    known = [
        (title, metric, metric.key(phase))
        for phase, title in _PHASES.items()
        for metric in (task.primary, task.second)
        if scores.get(metric.key(phase)) is not None
    ]
    if not known:
        return ""
    rows = [
        (title, metric.title, metric.text(scores[key]), _spread(export, metric, key))
        for title, metric, key in known
    ]
    whose = " of the adapter before the cut" if export.is_cut else ""
    text = f"## Scores{whose}\n\n"
    text += _table(("on", "metric", "value", "mean ± sd over seeds, last round"), rows)
    measured = export.measured_at_rank
    if measured is not None:
        score = f"{task.primary.title} {task.primary.text(measured)}"
        text += f"\n\nAfter the cut, on test data: {score}."
    return text


def _spread(export: Exported, metric: Metric, key: str) -> str:
    spread = export.run.spread(key)
    if spread is None:
        return "one seed"
    mean, sd, count = spread
    return f"{metric.text(mean)} ± {metric.text(sd)} of {count}"


def _cut(export: Exported) -> str:
    cut = export.truncation
    if cut is None:
        return ""
    rows = [(name, f"{share:.2%}") for name, share in sorted(cut.lost_by_module.items())]
    return (
        f"## What the cut to rank {cut.rank} lost\n\nThe best approximation of every module's "
        f"update by {cut.rank} components; {cut.lost:.2%} of the squared norm is lost.\n\n"
        + _table(("module", "lost"), rows)
    )


def _limitations(export: Exported, license_id: str | None) -> str:
    lines = [
        "It inherits what the base model was trained on, with its errors and biases.",
        "It is fit for texts like those of the clients; on others nothing was measured.",
    ]
    if export.stored.spec.base.random_weights:
        lines[0] = (
            "The base model's weights are random, it was never trained: scores are of no use but "
            "to compare runs of the same model."
        )
    if export.stored.facts.get("base_weights") and not export.merged:
        lines.append("The base model's weights on the hub are whole: on those it was not measured.")
    if export.run.setting("privacy", "kind") in {None, "none"}:
        lines.append("Trained without differential privacy: it may tell something of the data.")
    if export.stored.spec.base.num_layers and not export.merged:
        lines.append("It fits the base model only when that is cut to its first layers, as above.")
    if export.stored.facts.get("head") == "local":
        lines.append("Every client kept a head of its own: the one here was never trained.")
    lines.append(
        f"The base model's license, as its card states it: {markdown_text(license_id)}."
        if license_id
        else "The base model's card states no license: ask before you pass this on."
    )
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return markdown_text(value, _LONGEST_CELL)
