"""What a node answers: what it is, what training brought, and how good what it received is."""

import logging
import os
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from safetensors import SafetensorError

from hafl_app.client.answering_faults import Handler, answering_faults
from hafl_app.client.bandwidth import bandwidth_kbps
from hafl_app.client.base_precision import base_precision
from hafl_app.client.error_feedback import read_errors, write_errors
from hafl_app.client.own_data import DATA_PATH, own_file, own_share
from hafl_app.client.permissions import Permissions
from hafl_app.client.rank_budget import NodeLimits, rank_budget
from hafl_app.config.compose import SettingsError
from hafl_app.config.schema import RankTier, Settings
from hafl_app.data.errors import UnfitDataError
from hafl_app.data.own_file import OwnFile
from hafl_app.data.shares import Share
from hafl_app.data.sources import ON_DEVICE
from hafl_app.lowrank.factors import Adapter
from hafl_app.privacy.mechanism import (
    NoiseSource,
    PrivacyError,
    check_local_plan,
    privatize_upload,
    trained_part,
)
from hafl_app.run import build
from hafl_app.seeds import client_seed
from hafl_app.training.adapter_arrays import from_arrays
from hafl_app.training.base_model import ModelError
from hafl_app.training.device import device_facts, resolve_device, threads
from hafl_app.training.evaluate import evaluate as score
from hafl_app.training.local import TrainResult
from hafl_app.training.local import train as train_locally
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.quantization.block_precision import BLOCKWISE
from hafl_app.wire.node_profile import PROFILE, UNNUMBERED, NodeProfile
from hafl_app.wire.records import (
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    SECONDS,
    SERVER_ROUND,
    adapter_content,
    read_adapter,
    read_label_names,
    read_partition_id,
    read_plan,
)
from hafl_app.wire.uploads import encode_upload

_LOGGER = logging.getLogger(__name__)
_LOCAL_HEAD = "local-head"


@answering_faults
def query(message: Message, context: Context) -> Message:
    """Answer with this node's profile."""
    node = _node(context)
    told = read_label_names(message.content)
    share = _share(node, told)
    tier = _budget(node, NodeLimits.of(context.node_config), len(share.label_names))
    device = device_facts(resolve_device(node.settings.client.device))
    profile = NodeProfile(
        partition_id=node.partition_id,
        num_partitions=node.num_partitions,
        rank=tier.rank,
        rank_pattern=tier.rank_pattern,
        num_examples=share.num_examples,
        device=device.kind,
        device_name=device.name,
        memory_total_mb=device.memory_total_mb,
        memory_free_mb=device.memory_free_mb,
        torch_version=device.torch_version,
        cuda_version=device.cuda_version,
        bandwidth_kbps=bandwidth_kbps(context.node_config),
        own_data=node.own is not None,
        # Only if they are asked for: a node's classes say something about its texts.
        label_names=share.label_names if node.own is not None and told is None else (),
    )
    return Message(RecordDict({PROFILE: profile.to_record()}), reply_to=message)


@answering_faults
def train(message: Message, context: Context) -> Message:
    """Train the plan's components on this node's data and upload them."""
    node = _node(context)
    settings, partition_id = node.settings, _number(node, message)
    share = _share(node, read_label_names(message.content))
    model = _model(node, context, share)
    limits = NodeLimits.of(context.node_config)
    plan = limits.limit_plan(read_plan(message.content))
    adapter = _received(message, context)
    options = limits.limit_options(
        build.train_options(settings), plan, settings.client.local_epochs
    )
    private = settings.privacy.kind == "local_dp"
    if private:
        check_local_plan(plan)  # a server may ask for more than this node gives
    server_round = int(message.content.config_records[CONFIG][SERVER_ROUND])  # type: ignore[arg-type]
    with threads(settings.client.num_threads):
        result = train_locally(
            model,
            adapter,
            plan,
            share.train(),
            options,
            client_seed(settings.seed, server_round, partition_id),
        )
    if plan.head == "local":
        context.state[_LOCAL_HEAD] = ArrayRecord(dict(result.adapter.head))
    upload = result.adapter if plan.head == "averaged" else result.adapter.with_head({})
    if private:
        privacy = build.privacy_options(settings)
        label = f"upload/{partition_id}"
        generator = NoiseSource(privacy.noise_key).generator(server_round, label, upload)
        upload = privatize_upload(upload, trained_part(adapter, plan), privacy, generator)
    importance = {name: scores.numpy() for name, scores in result.importance.items()}
    arrays, errors = encode_upload(
        upload,
        adapter,
        plan,
        importance,
        read_errors(context.state),
        client_seed(settings.seed, server_round, partition_id),
    )
    if plan.error_feedback:
        write_errors(context.state, errors)
    metrics = _metrics(result, private)
    return Message(adapter_content(arrays, **{METRICS: metrics}), reply_to=message)


@answering_faults
def evaluate(message: Message, context: Context) -> Message:
    """Score what the server sent on the share of data that this node kept aside."""
    node = _node(context)
    settings = node.settings
    if settings.privacy.kind == "local_dp":
        raise PrivacyError("scores on private data carry no noise: refused under local_dp")
    share = _share(node, read_label_names(message.content))
    model = _model(node, context, share)
    plan = read_plan(message.content)
    with threads(settings.client.num_threads):
        model.load(_received(message, context), plan)
        scores = score(model, share.holdout(), settings.client.precision)
    return Message(RecordDict({METRICS: MetricRecord({**scores.to_wire()})}), reply_to=message)


@dataclass(frozen=True)
class _Node:
    """The run's settings and what this node is in it."""

    settings: Settings
    own: OwnFile | None
    partition_id: int
    num_partitions: int


def _node(context: Context) -> _Node:
    build.show_log()
    config = context.node_config
    settings = build.settings_of_run(context.run_config)
    own = own_file(settings, config)
    Permissions.of(config, os.environ).check(_as_read_here(settings, own))
    if own is None and settings.dataset.source == ON_DEVICE:
        raise SettingsError(
            f"dataset=on_device: this node has no data, {DATA_PATH} in its --node-config names them"
        )
    if own is not None and "partition-id" not in config:
        return _Node(settings, own, UNNUMBERED, 0)
    if not {"partition-id", "num-partitions"} <= set(config):
        raise SettingsError(
            f"this node's --node-config needs partition-id and num-partitions, or {DATA_PATH}"
        )
    return _Node(settings, own, int(config["partition-id"]), int(config["num-partitions"]))


def _as_read_here(settings: Settings, own: OwnFile | None) -> Settings:
    """Return the settings without data that this node does not read, so need not be allowed."""
    if own is None and settings.dataset.source != ON_DEVICE:
        return settings
    return replace(settings, dataset=replace(settings.dataset, path=None, test_path=None, hub=None))


def _number(node: _Node, message: Message) -> int:
    """Return what this node is known by in the run: its partition, or what the server chose."""
    if node.partition_id != UNNUMBERED:
        return node.partition_id
    return read_partition_id(message.content)


def _budget(node: _Node, limits: NodeLimits, num_labels: int) -> RankTier:
    tier = None
    if node.partition_id != UNNUMBERED:
        tier = build.client_tiers(node.settings, node.num_partitions)[node.partition_id]
    return rank_budget(node.settings, limits, tier, num_labels)


def _share(node: _Node, label_names: tuple[str, ...] | None) -> Share:
    """Return this node's data: its own file, whatever the run's data set, or its partition."""
    if node.own is None:
        text = build.federated_text(node.settings, node.num_partitions)
        return text.share(node.partition_id)
    try:
        return own_share(node.settings, node.own, label_names)
    except UnfitDataError as error:
        _LOGGER.warning("%s; %s", error, error.details)
        raise


def _model(node: _Node, context: Context, share: Share) -> LoraModel:
    try:
        precision = _base_precision(node, context, share)
        return build.model(node.settings, len(share.label_names), precision)
    except (OSError, SafetensorError) as error:  # files that went away, or are not whole
        raise ModelError(
            f"model.path={node.settings.model.path}: cannot be loaded ({type(error).__name__})"
        ) from error


def _base_precision(node: _Node, context: Context, share: Share) -> str | None:
    """Return what this node chose for its base model; None where the settings say it."""
    if node.settings.model.quantization != BLOCKWISE:
        return None
    limits = NodeLimits.of(context.node_config)
    rank = _budget(node, limits, len(share.label_names)).rank
    return base_precision(node.settings, limits, rank, share, context.state)


def _metrics(result: TrainResult, private: bool) -> MetricRecord:
    if private:  # losses, times and memory follow from the texts, and carry no noise
        return MetricRecord({NUM_EXAMPLES: result.num_examples})
    return MetricRecord(
        {
            NUM_EXAMPLES: result.num_examples,
            "loss": result.loss,
            "steps": result.steps,
            SECONDS: result.seconds,
            "probe-seconds": result.probe_seconds,
            "peak-memory-mb": result.peak_memory_mb,
            "micro-batch-size": result.micro_batch_size,
            "out-of-time": int(result.out_of_time),
        }
    )


def _received(message: Message, context: Context) -> Adapter:
    arrays = read_adapter(message.content)
    adapter = from_arrays(arrays.modules, arrays.head)
    if _LOCAL_HEAD in context.state.array_records and not adapter.head:
        head = context.state.array_records[_LOCAL_HEAD]
        adapter = adapter.with_head(head.to_torch_state_dict())
    return adapter


HANDLERS: dict[str, Handler] = {
    MessageType.QUERY: query,
    MessageType.TRAIN: train,
    MessageType.EVALUATE: evaluate,
}
"""What answers a message, by its type."""
