"""Settings that have no effect beside the others of a run: what was typed is not ignored silently.

Combinations that would mislead are refused in `hafl_app.run.refusals`. These are harmless, and in a
sweep over another setting often meant: they are warned of.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any, Final

from hafl_app.config.overrides import parse_overrides
from hafl_app.config.schema import Settings
from hafl_app.data.settings import DatasetSettings
from hafl_app.fields import choices_of
from hafl_app.heads.settings import ClosedFormSettings
from hafl_app.tracking.settings import TrackingSettings
from hafl_app.training.settings import CLOSED_FORM

_NO_SUCH: Final = object()
_ANY: Final = ()  # any value but 0, false and null
OR: Final = " or "
_TEXT: Final = tuple(name for name in choices_of(DatasetSettings, "source") if name != "digits")
_TALKS: Final = (
    "dataset.format",
    tuple(name for name in choices_of(DatasetSettings, "format") if name != "columns"),
)
_PRIVATE: Final = ("privacy.kind", ("central_dp", "local_dp"))
_WANDB: Final = ("tracking", ("wandb",))
_MLFLOW: Final = ("tracking", ("mlflow",))
_WITH_PROJECTS: Final = ("tracking", ("mlflow", "trackio", "wandb"))
_GENERATED: Final = ("dataset.source", ("synthetic",))
_FROM_MEMORY: Final = ("ranks.source", ("memory",))
_CLOSED_FORM: Final = ("model.head", (CLOSED_FORM,))
_RIDGE: Final = ("model.closed_form.rule", ("ridge",))
_ROUNDS: Final = ("federation.num_rounds", _ANY)
_RAY: Final = ("engine", ("ray",))
_CHANGE: Final = ("strategy.aggregation", ("change",))
_TAIL: Final = (f"strategy.pruning{OR}strategy.regularizer", (True,))
_BY_NORM: Final = ("strategy.weighting", ("norm",))
_BY_IMPORTANCE: Final = ("strategy.selection", ("importance",))
_GRADIENTS: Final = ("sensitivity", "smoothed", "adalora")
_MIXED: Final = ("federation.upload", ("mixed",))

NEEDS: Final[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
    "partition.dirichlet_alpha": ("partition.kind", ("dirichlet",)),
    "partition.classes_per_partition": ("partition.kind", ("pathological",)),
    "partition.column": ("partition.kind", ("natural",)),
    "privacy.clip_norm": _PRIVATE,
    "privacy.noise_multiplier": _PRIVATE,
    "privacy.delta": _PRIVATE,
    "privacy.max_epsilon": _PRIVATE,
    "privacy.noise_seed": _PRIVATE,
    "privacy.largest_change": ("privacy.secure_aggregation", (True,)),
    "tracking.project": _WITH_PROJECTS,
    "tracking.entity": _WANDB,
    "tracking.mode": _WANDB,
    "tracking.uri": _MLFLOW,
    "dataset.num_train": _GENERATED,
    "dataset.num_test": _GENERATED,
    "dataset.hub": ("dataset.source", ("banking77", "newsgroups", "natural_instructions", "local")),
    "dataset.task_fraction": ("dataset.source", ("natural_instructions",)),
    "dataset.text_column": ("dataset.source", ("banking77", "local", "on_device")),
    "dataset.system_prompt": _TALKS,
    "model.chat_template": _TALKS,
    "dataset.max_length": ("dataset.source", _TEXT),
    "model.head": ("model.task", ("classification", "image_classification")),
    "model.head_refresh_every": _CLOSED_FORM,
    **{f"model.closed_form.{field.name}": _CLOSED_FORM for field in fields(ClosedFormSettings)},
    "model.pooling": ("model.task", ("classification", "image_classification")),
    "client.schedule.final": ("client.schedule.kind", ("linear", "cosine")),
    "model.memory_budget_mb": ("model.quantization", ("blockwise",)),
    "ranks.memory_margin": _FROM_MEMORY,
    "ranks.memory_limit_mb": _FROM_MEMORY,
    "federation.trim_fraction": ("federation.robust", ("trimmed_mean",)),
    "federation.stream_buffer": ("federation.streaming", (True,)),
    "federation.early_stopping.min_delta": ("federation.early_stopping.patience", _ANY),
    "federation.generate_tokens": (
        f"federation.generate_examples{OR}federation.generate_on_clients",
        _ANY,
    ),
    "federation.generate_seconds": ("federation.generate_on_clients", _ANY),
    "federation.watch_tokens": ("model.task", ("causal_lm",)),
    "federation.alone_at_max_rank": ("federation.alone_clients_per_rank", _ANY),
    "federation.quarantine.rounds": ("federation.quarantine.after", _ANY),
    "strategy.coverage_exponent": _CHANGE,
    "strategy.server_step": _CHANGE,
    "strategy.decay": _TAIL,
    "strategy.min_rank": _TAIL,
    "strategy.tail_weight": ("strategy.regularizer", (True,)),
    "strategy.norm_scope": _BY_NORM,
    "strategy.norm_of": _BY_NORM,
    "strategy.importance": _BY_IMPORTANCE,
    "strategy.exploration": _BY_IMPORTANCE,
    "strategy.scope": ("strategy.selection", ("importance", "random")),
    "strategy.source": ("strategy.importance", _GRADIENTS),
    "strategy.smoothing": ("strategy.importance", ("smoothed", "adalora", "contribution")),
    "strategy.align": ("strategy.rotation_weight", _ANY),
    "strategy.upgrade": _MIXED,
    "strategy.upload_seconds": _MIXED,
    "strategy.bandwidth_hz": _MIXED,
    "strategy.transmit_power_dbm": _MIXED,
    "strategy.noise_dbm_per_hz": _MIXED,
    "strategy.path_loss_db_at_1km": _MIXED,
    "strategy.path_loss_exponent": _MIXED,
    "strategy.distances_m": _MIXED,
    "devices.classes.*.share": ("devices.assign", ("share",)),
    "devices.classes.*.up_to_rank": ("devices.assign", ("rank",)),
    "federation.client_cpus": _RAY,
    "federation.client_gpus": _RAY,
}
"""Settings, and another one, or one of two, that must have one of these values for them to count.

A star is the name of an entry; ``tracking`` has the trackers that are switched on.
"""

THEN: Final[Mapping[str, tuple[tuple[str, tuple[Any, ...]], ...]]] = {
    "model.closed_form.ridge": (_RIDGE,),
    "model.closed_form.ridge_by": (_RIDGE, ("model.closed_form.ridge", (None,))),
    "model.closed_form.temperature_by": (("model.closed_form.temperature", (None,)),),
    "model.closed_form.trained": (_ROUNDS,),
}
"""What some of these need beside that: each must hold."""


def without_effect(
    jobs: Sequence[Settings], typed: Sequence[str], *, compared: bool = False
) -> Iterator[str]:
    """Yield a line for every typed setting that changes nothing.

    Parameters
    ----------
    jobs
        Settings of a run, or of all jobs of a sweep: what counts in one of them is not named.
    typed
        Overrides, as they were typed.
    compared
        Whether the jobs are those of a comparison.
    """
    last: dict[str, str] = {}
    for override in parse_overrides(typed):
        name, line = override.key_or_group, override.input_line or ""
        if name in last:
            yield f"{last[name]} has no effect: {line} comes after it"
        last[name] = line
    for name, line in last.items():
        if name.startswith("compare.") and not compared:
            yield f"{line} has no effect: only a comparison reads it"
        reasons = (_lacking(jobs, *need) for need in _needs(name))
        reason = next(filter(None, reasons), "") or _never_due(jobs, name)
        if reason:
            yield f"{line} has no effect {reason}"


def _needs(name: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield what a setting needs, in the order in which it is to be named."""
    if known := next((key for key in NEEDS if fnmatchcase(name, key)), None):
        yield NEEDS[known]
        yield from THEN.get(known, ())


def _lacking(jobs: Sequence[Settings], condition: str, accepted: tuple[Any, ...]) -> str:
    """Say which other setting has another value than one of these in all jobs; empty if none."""
    names = condition.split(OR)
    values = [[_value(job, name) for name in names] for job in jobs]
    if any(_NO_SUCH in of_job for of_job in values):  # a strategy without the condition
        return ""
    if any(_counts(value, accepted) for of_job in values for value in of_job):
        return ""
    given = [f"{name}={_word(v)}" for name, v in zip(names, values[0], strict=True)]
    expected = " or ".join(map(_word, accepted)) or "above 0"
    return f"with {' and '.join(given)}, only with {expected}"


def _never_due(jobs: Sequence[Settings], name: str) -> str:
    """Say that no job has as many rounds as lie between two refreshes; empty if one has."""
    if name != "model.head_refresh_every":
        return ""
    most = max(job.federation.num_rounds for job in jobs)
    if any(job.model.head_refresh_every <= job.federation.num_rounds for job in jobs):
        return ""
    return f"with federation.num_rounds={most}: the head is solved before round 1 alone"


def _counts(value: Any, accepted: tuple[Any, ...]) -> bool:
    if isinstance(value, TrackingSettings):
        return not set(accepted).isdisjoint(value.chosen)
    return value in accepted if accepted else bool(value)


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part, _NO_SUCH)
    return value


def _word(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
