"""Read and check the command line of `scripts/evaluate.py`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hafl_app.config.compose import SettingsError, compose
from hafl_app.config.schema import Settings
from hafl_app.data.errors import nearest
from hafl_app.experiments.run_data import data_of_run
from hafl_app.metrics import EXACT_MATCH, LOSS, ROUGE_L
from hafl_app.training.adapter_card import read_card
from hafl_app.training.answers import require_rouge

NO_ADAPTER: Final = "none"
METRICS: Final = (LOSS.name, ROUGE_L.name, EXACT_MATCH.name)
_TRUST: Final = "model.trust_remote_code"
_OF_A_RUN: Final = ("output_dir", "resume")
_OF_TRAINING: Final = ("strategy", "lora", "partition", "ranks", "privacy", "tracking", "compare")
_OWN: Final = ("adapter", "by", "metrics", "max_new_tokens", "max_examples", "tasks", "output")
_BY_CLIENT: Final = "client"


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
    by_client
        Score each client's held-out rows by themselves, not the test set.
    """

    adapter: str
    settings: Settings
    max_length: int | None = None
    metrics: tuple[str, ...] = (LOSS.name,)
    max_new_tokens: int = 64
    max_examples: int | None = None
    tasks: tuple[str, ...] = ()
    output: Path | None = None
    by_client: bool = False

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
    hafl_app.packages.MissingPackageError
        If a metric's package is not installed.
    """
    pairs = [argument.partition("=") for argument in arguments]
    _refuse_unclear(pairs)
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
    by_client = _by_client(own, named)
    if by_client:
        overrides = [*data_of_run(Path(own["adapter"]).expanduser()), *overrides]
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
        by_client,
    )
    if own.get("max_new_tokens") and not request.generated:
        raise SettingsError(
            f"max_new_tokens={request.max_new_tokens}: of generated answers, add "
            f"metrics={ROUGE_L.name} or metrics={EXACT_MATCH.name}"
        )
    _check_output(request.output)
    if ROUGE_L.name in request.metrics:
        require_rouge()
    return request


def require_adapter(request: EvaluationRequest) -> None:
    """Refuse a folder without a saved adapter, before anything heavy is imported.

    Raises
    ------
    hafl_app.training.adapter_card.SavedAdapterError
        In one line.
    """
    if request.adapter != NO_ADAPTER:
        read_card(Path(request.adapter).expanduser())


def _refuse_unclear(pairs: Iterable[tuple[str, str, str]]) -> None:
    """Refuse own options that are given twice or empty, and a run's that have no effect here."""
    given = [(key, value) for key, _, value in pairs]
    for key, count in Counter(key for key, _ in given if key in _OWN).items():
        if count > 1:
            raise SettingsError(f"{key}=: given {count} times, expected once")
    for key, value in given:
        if key in _OWN and key != "adapter" and not value:
            raise SettingsError(f"{key}=: expected a value, or leave it out")
        if key in _OF_A_RUN:
            raise SettingsError(f"{key}=: of a run; output=FILE is where the result goes")
        if key.partition(".")[0] in _OF_TRAINING:
            raise SettingsError(f"{key}=: of training, an evaluation does not read it")


def _by_client(own: Mapping[str, str], named: Iterable[str]) -> bool:
    """Return whether the clients' rows are scored; refuse what would make them other rows."""
    if "by" not in own:
        return False
    if own["by"] != _BY_CLIENT:
        raise SettingsError(
            f"by={own['by']}: expected {_BY_CLIENT}; categories of the data are shown without it"
        )
    if own["adapter"] == NO_ADAPTER:
        raise SettingsError(f"by={_BY_CLIENT}: needs an adapter in the folder of its run")
    if own.get("tasks"):
        raise SettingsError(f"by={_BY_CLIENT} with tasks={own['tasks']}: tasks have no clients")
    for key in sorted(named):
        group, _, name = key.partition(".")
        moved = group == "dataset" and name in ("path", "test_path", "max_length")
        if group in ("dataset", "seed", "federation") and not moved:
            raise SettingsError(
                f"{key}=: by={_BY_CLIENT} scores the rows that each client of the run held out; "
                "only dataset.path, dataset.test_path and dataset.max_length may differ"
            )
    return True


def _check_output(output: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is scored."""
    if output is None:
        return
    if output.is_dir():
        raise SettingsError(f"output={output}: expected a file, it is a folder")
    if file := next((p for p in output.absolute().parents if p.exists() and not p.is_dir()), None):
        raise SettingsError(f"output={output}: {file} is a file, expected a folder")


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
