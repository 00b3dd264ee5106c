"""From checked settings to the objects of a run: where settings, data and training meet."""

import functools
import logging
import os
import random
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hafl_app.config.compose import compose
from hafl_app.config.schema import RankTier, Settings
from hafl_app.data.federated import FederatedText
from hafl_app.data.partition import Partitioning
from hafl_app.data.sources import TextSource
from hafl_app.federation.privacy import PrivacyOptions, new_noise_key
from hafl_app.federation.profiles import scale_tiers
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.strategies.options import FederationOptions
from hafl_app.training.base import BaseSpec, load_tokeniser
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier, resident_classifier
from hafl_app.training.device import resolve_device
from hafl_app.training.local import TrainOptions

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
    return TextSource(**{f.name: getattr(settings.dataset, f.name) for f in fields(TextSource)})


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
    return FederationOptions(
        seed=settings.seed,
        fraction_train=federation.fraction_train,
        fraction_evaluate=federation.fraction_evaluate,
        evaluate_every=federation.evaluate_every,
        num_rounds=federation.num_rounds,
        local_epochs=settings.client.local_epochs,
        max_steps=settings.client.max_steps,
        head=settings.model.head,  # type: ignore[arg-type]
        lora_alpha=settings.lora.lora_alpha,
        scaling=settings.lora.scaling,
        timeout_s=federation.round_timeout_s,
        min_replies=federation.min_replies,
        max_retries=federation.max_retries,
        max_norm_ratio=federation.max_norm_ratio,
        clip_ratio=federation.clip_ratio,
        robust=federation.robust,
        trim_fraction=federation.trim_fraction,
        quarantine_after=federation.quarantine.after,
        quarantine_rounds=federation.quarantine.rounds,
        privacy=privacy_options(settings),
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
