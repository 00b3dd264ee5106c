"""Objects of a run, built from checked settings."""

import functools
import random
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from hafl_app.config.compose import SettingsError, compose, strategy_arguments
from hafl_app.config.schema import RankTier, Settings
from hafl_app.data.central import central_rows
from hafl_app.data.combinations import ON_DEVICE
from hafl_app.data.federated import FederatedText
from hafl_app.data.pairs import Pairs, pairs_of
from hafl_app.data.partition import Partitioning
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.sources import load_text
from hafl_app.kept import cache_folder
from hafl_app.metrics import TASKS, Task
from hafl_app.privacy.mechanism import PrivacyOptions, new_noise_key
from hafl_app.run.checks import check_settings
from hafl_app.run.refusals.devices import no_class_for
from hafl_app.run.tokenization import pair_tokenizer, tokenizing
from hafl_app.server.held_out_clients import draw_unseen
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.server.numbering import Numbering
from hafl_app.server.options import RunOptions
from hafl_app.server.simulated_clock import Fleet, SimulatedClock
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.training.answers import require_rouge
from hafl_app.training.classifier import ClassifierSpec
from hafl_app.training.device import resolve_device
from hafl_app.training.flops import RowFlops
from hafl_app.training.flops import row_flops as count_row_flops
from hafl_app.training.lora_model import LoraModel, LoraSpec, resident_model, with_quantization
from hafl_app.training.quantization.precisions import BLOCKWISE, NOT_QUANTIZED, PRECISIONS
from hafl_app.training.settings import CLOSED_FORM, BaseSpec, ModelSettings, TrainOptions
from hafl_app.training.specs import lora_spec
from hafl_app.training.step_memory import StepMemory
from hafl_app.training.step_memory import step_memory as count_step_memory
from hafl_app.wire.node_profile import scale_tiers

KNOBS = {
    "strategy": "strategy",
    "model": "model",
    "dataset": "dataset",
    "rounds": "federation.num_rounds",
    "seed": "seed",
}


def overrides_of_run(run_config: Mapping[str, Any]) -> list[str]:
    """Return the Hydra overrides of a Flower run config.

    Parameters
    ----------
    run_config
        ``overrides``, a string of Hydra overrides, and the everyday knobs, which come after and
        win; empty means "as in conf/".

    Raises
    ------
    hafl_app.config.compose.SettingsError
        If a quotation mark is not closed.
    """
    try:
        overrides = shlex.split(str(run_config.get("overrides", "")))
    except ValueError as error:
        raise SettingsError(f"overrides of the run config: {error}") from error
    for knob, setting in KNOBS.items():
        if str(run_config.get(knob, "")):
            overrides.append(f"{setting}={run_config[knob]}")
    return overrides


def settings_of_run(run_config: Mapping[str, Any]) -> Settings:
    """Compose the settings of a Flower run config, see `overrides_of_run`.

    Raises
    ------
    hafl_app.config.compose.SettingsError
        In one line, if they are wrong or do not go together.
    """
    settings = compose(overrides_of_run(run_config))
    check_settings(settings)
    return settings


def base_spec(settings: Settings) -> BaseSpec:
    """Return the identity of the base model.

    With ``model.quantization=blockwise`` a node chooses by its data; the server, which has none,
    takes the model as it is.
    """
    spec = BaseSpec(**{f.name: getattr(settings.model, f.name) for f in fields(BaseSpec)})
    return replace(spec, quantization=NOT_QUANTIZED) if spec.quantization == BLOCKWISE else spec


def task(settings: Settings) -> Task:
    """Return the task of the run, with its metrics."""
    return TASKS[settings.model.task]


def test_pairs(settings: Settings) -> Pairs:
    """Return the prompts and the expected answers of the test set, in full length."""
    if settings.dataset.source == ON_DEVICE:
        table = central_rows(settings.dataset)
        return Pairs(*(table[name].tolist() for name in ("text", "answer", "label")))
    text = load_text(settings.dataset)
    return pairs_of(text.test, text.label_names)


def federated_text(
    settings: Settings, num_partitions: int, spec: BaseSpec | None = None
) -> FederatedText:
    """Return the data of a federation, loaded at the first use.

    Parameters
    ----------
    spec
        Base model whose tokenizer counts; None for that of the settings.
    """
    partitioning = Partitioning(settings.partition, num_partitions, settings.seed)
    # The same object for every message of a process, so that data stay loaded.
    return _federated_text(settings.dataset, partitioning, spec or base_spec(settings))


@functools.lru_cache(maxsize=2)
def _federated_text(
    dataset: DatasetSettings, partitioning: Partitioning, spec: BaseSpec
) -> FederatedText:
    return FederatedText(
        dataset,
        partitioning,
        tokenize_pairs=pair_tokenizer(spec, dataset.max_length),
        **tokenizing(spec, dataset.max_length),
    )


def model_spec(settings: Settings, num_labels: int) -> LoraSpec:
    """Return the specification of the model: all that decides its weights before training.

    Parameters
    ----------
    num_labels
        Classes; without meaning for a causal language model.
    """
    return lora_spec(
        base_spec(settings),
        num_labels,
        _target_modules(settings),
        settings.lora.lora_dropout,
        settings.seed,
    )


def classifier_spec(settings: Settings, num_labels: int) -> ClassifierSpec:
    """Return the specification of a classifier, see `model_spec`."""
    return ClassifierSpec(
        base=base_spec(settings),
        num_labels=num_labels,
        target_modules=_target_modules(settings),
        lora_dropout=settings.lora.lora_dropout,
        seed=settings.seed,
    )


def _target_modules(settings: Settings) -> str | tuple[str, ...]:
    targets = settings.lora.target_modules
    return targets if isinstance(targets, str) else tuple(targets)


def model(settings: Settings, num_labels: int, quantization: str | None = None) -> LoraModel:
    """Return this process's model on its device; the base model is loaded once.

    Parameters
    ----------
    quantization
        Chosen by this node, as in a `BaseSpec`; None for that of the settings.
    """
    spec = model_spec(settings, num_labels)
    if quantization is not None:
        spec = with_quantization(spec, quantization)
    found, device = resident_model(spec), resolve_device(settings.client.device)
    # Moving walks through the whole model even where there is nothing to move.
    return found if found.device.type == device.type else found.to(device)


def step_memory(settings: Settings, num_labels: int) -> StepMemory:
    """Return the memory that training takes on this node by rank; counted once a machine.

    With ``model.quantization=blockwise`` it is that of the fewest bits.
    """
    spec = model_spec(settings, num_labels)
    if settings.model.quantization == BLOCKWISE:
        spec = with_quantization(spec, PRECISIONS[0])
    return count_step_memory(
        spec,
        settings.lora.max_rank,
        train_options(settings),
        settings.dataset.max_length,
        resolve_device(settings.client.device),
        cache_folder() / "memory",
    )


def row_flops(settings: Settings, num_labels: int) -> RowFlops:
    """Return the floating-point operations of a row of the run's model; counted once a machine."""
    spec, model = model_spec(settings, num_labels), settings.model
    return _row_flops(spec, model.head, settings.client.gradient_checkpointing)


@functools.lru_cache(maxsize=2)  # asked for with every reply
def _row_flops(spec: LoraSpec, head: Any, checkpointing: bool) -> RowFlops:
    folder = cache_folder() / "flops"
    return count_row_flops(spec, head=head, checkpointing=checkpointing, folder=folder)


def train_options(settings: Settings) -> TrainOptions:
    """Return the options of local training."""
    return TrainOptions(**{f.name: getattr(settings.client, f.name) for f in fields(TrainOptions)})


def privacy_options(settings: Settings) -> PrivacyOptions:
    """Return the privacy options of the run, with a key for its noise."""
    key = new_noise_key(settings.privacy.noise_seed)
    return PrivacyOptions(**asdict(settings.privacy), noise_key=key)


def run_options(settings: Settings) -> RunOptions:
    """Return the options of the run, the same for every method."""
    return RunOptions(
        federation=settings.federation,
        client=settings.client,
        lora=settings.lora,
        privacy=privacy_options(settings),
        seed=settings.seed,
        **_head_options(settings.model),
    )


def _head_options(model: ModelSettings) -> dict[str, Any]:
    """Return the options of a run about its head."""
    if model.head != CLOSED_FORM:
        return {"head": model.head}
    return {
        "head": "averaged" if model.closed_form.trained else "sent",
        "closed_form": model.closed_form,
        "head_refresh_every": model.head_refresh_every,
    }


def node_directory(
    settings: Settings,
    label_names: tuple[str, ...] | None,
    numbering: Numbering | None = None,
) -> NodeDirectory:
    """Return the directory of a run whose nodes have not been queried yet.

    Parameters
    ----------
    label_names
        The run's classes; None if the nodes name theirs.
    numbering
        Of the resumed run.
    """
    federation = settings.federation
    return NodeDirectory(
        federation.round_timeout_s,
        start_timeout_s=federation.start_timeout_s,
        num_nodes=federation.num_clients,
        label_names=label_names,
        numbering=numbering,
        keeps_partitions=federation.partition_owner == "node",
    )


def client_tiers(settings: Settings, num_clients: int) -> list[RankTier]:
    """Return the tier of every partition, as the `ranks` group draws them."""
    ranks = settings.ranks
    drawn = _drawn_tiers(
        tuple(t.share for t in ranks.tiers), num_clients, ranks.order, settings.seed
    )
    return [ranks.tiers[i] for i in drawn]


@functools.lru_cache(maxsize=8)  # called for each of many simulated nodes
def _drawn_tiers(
    shares: tuple[float, ...], num_clients: int, order: str, seed: int
) -> tuple[int, ...]:
    """Return the index of each partition's tier."""
    tiers = scale_tiers(list(enumerate(shares)), num_clients)
    if order == "shuffled":
        random.Random(f"{seed}/ranks").shuffle(tiers)
    return tuple(tiers)


def device_name(settings: Settings, partition_id: int, rank: int) -> str:
    """Return the class of a client's simulated device.

    Parameters
    ----------
    rank
        Its largest.

    Raises
    ------
    SettingsError
        If no class affords the rank.
    """
    devices = settings.devices
    if devices.assign == "share":
        shares = tuple(one.share for one in devices.classes.values())
        num_clients = settings.federation.num_clients
        drawn = _drawn_tiers(shares, num_clients, settings.ranks.order, settings.seed)
        return [*devices.classes][drawn[partition_id % num_clients]]
    if name := devices.class_of_rank(rank):
        return name
    raise SettingsError(no_class_for(rank))


def fleet(settings: Settings) -> Fleet | None:
    """Return the clients' simulated devices; None without any."""
    if not settings.devices.classes:
        return None
    return Fleet(settings.devices, lambda p: device_name(settings, p.partition_id, max(p.ranks)))


def client_ranks(settings: Settings, num_clients: int) -> list[int]:
    """Return the rank of every partition, where its tier has no other for a layer type."""
    return [tier.rank for tier in client_tiers(settings, num_clients)]


def strategy(settings: Settings) -> HeterogeneousLora:
    """Return a fresh strategy with its hyper-parameters.

    Raises
    ------
    hafl_app.packages.MissingPackageError
        If answers are to be scored that cannot be.
    """
    if settings.federation.generate_examples:
        require_rouge()
    made: HeterogeneousLora = type(settings.strategy)(**strategy_arguments(settings))
    made.options = run_options(settings)
    made.coordinator.task = task(settings)
    made.coordinator.participation.held_out = unseen_partitions(settings)
    if devices := fleet(settings):
        silence_s = settings.federation.round_timeout_s
        made.coordinator.clock = SimulatedClock(devices, settings.seed, silence_s)
    return made


def unseen_partitions(settings: Settings) -> frozenset[int]:
    """Return the partitions that never train."""
    federation = settings.federation
    return draw_unseen(federation.num_clients, federation.unseen_clients, settings.seed)
