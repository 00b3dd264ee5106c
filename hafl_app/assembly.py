"""From checked settings to the objects of a run: where settings, data and training meet."""

import functools
import logging
import os
import random
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypedDict

from hafl_app.config.compose import compose
from hafl_app.config.schema import RankTier, Settings
from hafl_app.data.federated import FederatedText
from hafl_app.data.partition import Partitioning
from hafl_app.data.sources import TextSource
from hafl_app.data.text import Tokenise
from hafl_app.federation.directory import NodeDirectory
from hafl_app.federation.numbering import Numbering
from hafl_app.federation.privacy import PrivacyOptions, new_noise_key
from hafl_app.federation.profiles import scale_tiers
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.strategies.options import FederationOptions
from hafl_app.training.base import BaseSpec, load_tokeniser
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier, resident_classifier
from hafl_app.training.device import resolve_device
from hafl_app.training.local import TrainOptions
from hafl_app.training.memory import StepMemory
from hafl_app.training.memory import step_memory as count_step_memory

KNOBS = {
    "strategy": "strategy",
    "model": "model",
    "dataset": "dataset",
    "rounds": "federation.num_rounds",
    "seed": "seed",
}


def overrides_of_run(run_config: Mapping[str, Any]) -> list[str]:
    """Return the Hydra overrides that a Flower run config asks for.

    Parameters
    ----------
    run_config
        ``overrides``, a string of Hydra overrides, and the everyday knobs, which come after and
        win; empty means "as in conf/".
    """
    overrides = shlex.split(str(run_config.get("overrides", "")))
    for knob, setting in KNOBS.items():
        if str(run_config.get(knob, "")):
            overrides.append(f"{setting}={run_config[knob]}")
    return overrides


def settings_of_run(run_config: Mapping[str, Any]) -> Settings:
    """Compose the settings that a Flower run config asks for, see `overrides_of_run`.

    Raises
    ------
    hafl_app.config.compose.SettingsError
        In one line, if they are wrong.
    """
    return compose(overrides_of_run(run_config))


def show_log() -> None:
    """Print what this project logs from level INFO on, unless someone already shows it."""
    logger = logging.getLogger("hafl_app")
    logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def cache_folder() -> Path:
    """Return the folder of tokenised data: `$HAFL_CACHE`, else `hafl` in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HAFL_CACHE") or Path(root) / "hafl")


def base_spec(settings: Settings) -> BaseSpec:
    """Return the identity of the base model."""
    model = settings.model
    return BaseSpec(
        path=model.path,
        revision=model.revision,
        sha256=model.sha256,
        package_path=model.package_path,
        num_layers=model.num_layers,
        random_weights=model.random_weights,
        pooling=model.pooling,
        trust_remote_code=model.trust_remote_code,
    )


def text_source(settings: Settings) -> TextSource:
    """Return where the text comes from."""
    values = {f.name: getattr(settings.dataset, f.name) for f in fields(TextSource)}
    if values["label_names"] is not None:
        values["label_names"] = tuple(values["label_names"])
    return TextSource(**values)


def federated_text(settings: Settings, num_partitions: int) -> FederatedText:
    """Return the data of a federation; nothing is loaded before it is asked for."""
    dataset, partition = settings.dataset, settings.partition
    partitioning = Partitioning(
        num_partitions=num_partitions, seed=settings.seed, **asdict(partition)
    )
    shares = (dataset.validation_fraction, dataset.holdout_fraction)
    # The same object for every message of a process: what it loads stays loaded.
    return _federated_text(
        text_source(settings), partitioning, shares, base_spec(settings), dataset.max_length
    )


class _LazyTokeniser:
    """Loads the tokenizer when the first text comes, so that counting rows needs none."""

    def __init__(self, spec: BaseSpec, max_length: int) -> None:
        self._spec = spec
        self._max_length = max_length

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return load_tokeniser(self._spec, self._max_length)(texts)


@functools.lru_cache(maxsize=2)
def _federated_text(
    source: TextSource,
    partitioning: Partitioning,
    shares: tuple[float, float],
    spec: BaseSpec,
    max_length: int,
) -> FederatedText:
    validation_fraction, holdout_fraction = shares
    return FederatedText(
        source,
        partitioning,
        validation_fraction=validation_fraction,
        holdout_fraction=holdout_fraction,
        **tokenising(spec, max_length),
    )


class Tokenising(TypedDict):
    """How texts become tokens: the arguments of that name of what encodes text."""

    tokenise: Tokenise
    tokeniser_key: str
    cache: Path | None


def tokenising(spec: BaseSpec, max_length: int) -> Tokenising:
    """Return how texts become tokens; the tokenizer is loaded when the first text comes."""
    return Tokenising(
        tokenise=_LazyTokeniser(spec, max_length),
        tokeniser_key=_tokeniser_key(spec, max_length),
        cache=cache_folder(),
    )


def _tokeniser_key(spec: BaseSpec, max_length: int) -> str:
    # A tokenizer of the model's own code may cut texts otherwise.
    code = "/own code" if spec.trust_remote_code else ""
    return f"{spec.path}@{spec.revision}/{max_length}{code}"


def classifier_spec(settings: Settings, num_labels: int) -> ClassifierSpec:
    """Return what decides the classifier's weights before training."""
    targets = settings.lora.target_modules
    return ClassifierSpec(
        base=base_spec(settings),
        num_labels=num_labels,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        lora_dropout=settings.lora.lora_dropout,
        seed=settings.seed,
    )


def classifier(settings: Settings, num_labels: int) -> LoraClassifier:
    """Return this process's classifier on its device; the base model is loaded once."""
    device = resolve_device(settings.client.device)
    return resident_classifier(classifier_spec(settings, num_labels)).to(device)


def step_memory(settings: Settings, num_labels: int) -> StepMemory:
    """Return the memory that training takes on this node by rank; counted once a machine."""
    return count_step_memory(
        classifier_spec(settings, num_labels),
        settings.lora.max_rank,
        train_options(settings),
        settings.dataset.max_length,
        resolve_device(settings.client.device),
        cache_folder() / "memory",
    )


def train_options(settings: Settings) -> TrainOptions:
    """Return how clients train."""
    return TrainOptions(**{f.name: getattr(settings.client, f.name) for f in fields(TrainOptions)})


def privacy_options(settings: Settings) -> PrivacyOptions:
    """Return how private the run is, with a key for its noise."""
    values = {k: v for k, v in asdict(settings.privacy).items() if k != "noise_seed"}
    return PrivacyOptions(**values, noise_key=new_noise_key(settings.privacy.noise_seed))


def federation_options(settings: Settings) -> FederationOptions:
    """Return what holds for the whole run, whatever the method."""
    federation = settings.federation
    shared = {f.name for f in fields(FederationOptions)} & {f.name for f in fields(federation)}
    return FederationOptions(
        **{name: getattr(federation, name) for name in shared},
        seed=settings.seed,
        local_epochs=settings.client.local_epochs,
        max_steps=settings.client.max_steps,
        head=settings.model.head,  # type: ignore[arg-type]
        lora_alpha=settings.lora.lora_alpha,
        scaling=settings.lora.scaling,
        timeout_s=federation.round_timeout_s,
        quarantine_after=federation.quarantine.after,
        quarantine_rounds=federation.quarantine.rounds,
        privacy=privacy_options(settings),
    )


def node_directory(
    settings: Settings,
    label_names: tuple[str, ...] | None,
    numbering: Numbering | None = None,
) -> NodeDirectory:
    """Return the directory of a run whose nodes are still to be asked.

    Parameters
    ----------
    label_names
        The run's classes; None if the nodes are to say theirs.
    numbering
        Of the run that goes on.
    """
    federation = settings.federation
    return NodeDirectory(
        federation.round_timeout_s,
        start_timeout_s=federation.start_timeout_s,
        num_nodes=federation.num_clients,
        label_names=label_names,
        numbering=numbering,
    )


def client_tiers(settings: Settings, num_clients: int) -> list[RankTier]:
    """Return the tier of every partition, as the `ranks` group draws them."""
    tiers = scale_tiers([(t, t.share) for t in settings.ranks.tiers], num_clients)
    if settings.ranks.order == "shuffled":
        random.Random(f"{settings.seed}/ranks").shuffle(tiers)
    return tiers


def client_ranks(settings: Settings, num_clients: int) -> list[int]:
    """Return the rank of every partition, where its tier has no other for a layer type."""
    return [tier.rank for tier in client_tiers(settings, num_clients)]


def strategy(settings: Settings) -> HeterogeneousLora:
    """Return a fresh strategy with its hyper-parameters."""
    method: HeterogeneousLora = settings.strategy
    return type(method)(**{f.name: getattr(method, f.name) for f in fields(method) if f.init})
