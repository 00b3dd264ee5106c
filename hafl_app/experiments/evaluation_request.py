"""Read and check the command line of `scripts/evaluate.py`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hafl_app.config.compose import SettingsError, compose
from hafl_app.config.schema import Settings
from hafl_app.data.errors import nearest
from hafl_app.metrics import EXACT_MATCH, LOSS, ROUGE_L
from hafl_app.training.answers import require_rouge

NO_ADAPTER: Final = "none"
METRICS: Final = (LOSS.name, ROUGE_L.name, EXACT_MATCH.name)
_TRUST: Final = "model.trust_remote_code"
_OWN: Final = ("adapter", "metrics", "max_new_tokens", "max_examples", "tasks", "output")


@dataclass(frozen=True)
class EvaluationRequest:
    """Request to score an adapter or a base model.

    Parameters
    ----------
    adapter
        Folder of a saved adapter; ``none`` for the base model of ``settings`` alone.
    settings
        Its test set is what is scored on.
    max_length
        Tokens that rows are cut to; None as in the adapter's training.
    metrics
        Some of `METRICS`; ``loss`` brings all scores of one pass over the test set, of a
        classifier its accuracy too.
    max_new_tokens
        Of a generated answer, at least 1.
    max_examples
        Rows of the test set, at least 1; None is all.
    tasks
        Of ``lm-eval``, beside these.
    output
        File for the result as JSON.
    """

    adapter: str
    settings: Settings
    max_length: int | None = None
    metrics: tuple[str, ...] = (LOSS.name,)
    max_new_tokens: int = 64
    max_examples: int | None = None
    tasks: tuple[str, ...] = ()
    output: Path | None = None

    @property
    def generated(self) -> tuple[str, ...]:
        """The metrics of generated answers among those wanted."""
        return tuple(name for name in self.metrics if name != LOSS.name)


def read_request(arguments: Sequence[str]) -> EvaluationRequest:
    """Read a command line: ``key=value`` of its own, and Hydra overrides for all else.

    Raises
    ------
    hafl_app.config.compose.SettingsError
        If a value is wrong, ``adapter`` is missing, or there is no such metric.
    hafl_app.training.answers.MissingPackageError
        If a metric's package is not installed.
    """
    pairs = [argument.partition("=") for argument in arguments]
    own = {key: value for key, _, value in pairs if key in _OWN}
    overrides = ["".join(pair) for pair in pairs if pair[0] not in _OWN]
    named = {key for key, _, _ in pairs}
    if not own.get("adapter"):
        raise SettingsError("adapter= must be given: the folder of a saved adapter, or none")
    alone = own["adapter"] == NO_ADAPTER
    if alone and "model" not in named:
        raise SettingsError("adapter=none needs model=..., the base model to score")
    if not alone:
        _refuse_models(named)
    settings = compose(overrides)
    length = settings.dataset.max_length if alone or "dataset.max_length" in named else None
    request = EvaluationRequest(
        own["adapter"],
        settings,
        length,
        _metrics(own.get("metrics") or LOSS.name),
        _count(own, "max_new_tokens") or 64,
        _count(own, "max_examples"),
        tuple(filter(None, own.get("tasks", "").split(","))),
        Path(own["output"]).expanduser() if own.get("output") else None,
    )
    if ROUGE_L.name in request.metrics:
        require_rouge()
    return request


def _refuse_models(named: Iterable[str]) -> None:
    """Refuse settings of a base model beside an adapter: they would have no effect."""
    for key in sorted(named):
        if key.partition(".")[0] == "model" and key != _TRUST:
            raise SettingsError(
                f"{key}=: an adapter's folder names its base model; only adapter=none takes another"
            )


def _metrics(given: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(given.split(",")))
    for name in names:
        if name not in METRICS:
            raise SettingsError(
                f"metrics={given}: {name!r} is none of {', '.join(METRICS)}{nearest(name, METRICS)}"
            )
    return names


def _count(own: Mapping[str, str], name: str) -> int | None:
    value = own.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and int(value)):
        raise SettingsError(f"{name}={value}: expected a whole number, at least 1")
    return int(value)
