"""ClientApp: answer what this node is, train what the plan says, and score what is received."""

import os
from dataclasses import asdict

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors import SafetensorError

from hafl_app import assembly
from hafl_app.config.schema import Settings
from hafl_app.federation.faults import answering_faults
from hafl_app.federation.permissions import Permissions
from hafl_app.federation.privacy import (
    NoiseSource,
    PrivacyError,
    check_local_plan,
    privatise_upload,
    trained_part,
)
from hafl_app.federation.profiles import PROFILE, NodeProfile
from hafl_app.federation.records import (
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    SERVER_ROUND,
    AdapterArrays,
    adapter_content,
    read_adapter,
    read_plan,
)
from hafl_app.federation.sampling import client_seed
from hafl_app.lowrank.factors import Adapter
from hafl_app.training.adapter import from_arrays, to_arrays
from hafl_app.training.base import ModelError
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.device import describe_device, resolve_device, threads
from hafl_app.training.evaluate import evaluate as score
from hafl_app.training.local import TrainResult
from hafl_app.training.local import train as train_locally

_LOCAL_HEAD = "local-head"
app = ClientApp()


@app.query()
@answering_faults
def query(message: Message, context: Context) -> Message:
    """Answer with this node's profile."""
    settings, partition_id, num_partitions = _node(context)
    tier = assembly.client_tiers(settings, num_partitions)[partition_id]
    own_rank = context.node_config.get("rank")  # a real device knows it
    profile = NodeProfile(
        partition_id=partition_id,
        num_partitions=num_partitions,
        rank=tier.rank if own_rank is None else int(own_rank),
        rank_pattern=tier.rank_pattern if own_rank is None else {},
        num_examples=assembly.federated_text(settings, num_partitions).sizes()[partition_id],
        device=describe_device(resolve_device(settings.client.device)),
    )
    return Message(RecordDict({PROFILE: profile.to_record()}), reply_to=message)


@app.train()
@answering_faults
def train(message: Message, context: Context) -> Message:
    """Train the plan's components on this node's data and upload them."""
    settings, partition_id, num_partitions = _node(context)
    text = assembly.federated_text(settings, num_partitions)
    classifier = _classifier(settings, len(text.label_names))
    plan, adapter = read_plan(message.content), _received(message, context)
    private = settings.privacy.kind == "local_dp"
    if private:
        check_local_plan(plan)  # a server may ask for more than this node gives
    server_round = int(message.content.config_records[CONFIG][SERVER_ROUND])  # type: ignore[arg-type]
    with threads(settings.client.num_threads):
        result = train_locally(
            classifier,
            adapter,
            plan,
            text.train(partition_id),
            assembly.train_options(settings),
            client_seed(settings.seed, server_round, partition_id),
        )
    if plan.head == "local":
        context.state[_LOCAL_HEAD] = ArrayRecord(dict(result.adapter.head))
    upload = result.adapter if plan.head == "averaged" else result.adapter.with_head({})
    if private:
        options = assembly.privacy_options(settings)
        label = f"upload/{partition_id}"
        generator = NoiseSource(options.noise_key).generator(server_round, label, upload)
        upload = privatise_upload(upload, trained_part(adapter, plan), options, generator)
    importance = {name: scores.numpy() for name, scores in result.importance.items()}
    arrays = AdapterArrays(*to_arrays(upload), importance=importance)
    metrics = _metrics(result, private)
    return Message(adapter_content(arrays, **{METRICS: metrics}), reply_to=message)


@app.evaluate()
@answering_faults
def evaluate(message: Message, context: Context) -> Message:
    """Score what the server sent on the share of data that this node kept aside."""
    settings, partition_id, num_partitions = _node(context)
    if settings.privacy.kind == "local_dp":
        raise PrivacyError("scores on private data carry no noise: refused under local_dp")
    text = assembly.federated_text(settings, num_partitions)
    classifier = _classifier(settings, len(text.label_names))
    plan = read_plan(message.content)
    with threads(settings.client.num_threads):
        classifier.load(_received(message, context), plan)
        scores = score(classifier, text.holdout(partition_id), settings.client.precision)
    named = {k.replace("_", "-"): v for k, v in asdict(scores).items()}
    return Message(RecordDict({METRICS: MetricRecord(named)}), reply_to=message)


def _node(context: Context) -> tuple[Settings, int, int]:
    assembly.show_log()
    config = context.node_config
    settings = assembly.settings_of_run(context.run_config)
    Permissions.of(config, os.environ).check(settings)
    return settings, int(config["partition-id"]), int(config["num-partitions"])


def _classifier(settings: Settings, num_labels: int) -> LoraClassifier:
    try:
        return assembly.classifier(settings, num_labels)
    except (OSError, SafetensorError) as error:  # files that went away, or are not whole
        raise ModelError(
            f"model.path={settings.model.path}: cannot be loaded ({type(error).__name__})"
        ) from error


def _metrics(result: TrainResult, private: bool) -> MetricRecord:
    if private:  # losses, times and memory follow from the texts, and carry no noise
        return MetricRecord({NUM_EXAMPLES: result.num_examples})
    return MetricRecord(
        {
            NUM_EXAMPLES: result.num_examples,
            "loss": result.loss,
            "steps": result.steps,
            "seconds": result.seconds,
            "probe-seconds": result.probe_seconds,
            "peak-memory-mb": result.peak_memory_mb,
            "micro-batch-size": result.micro_batch_size,
        }
    )


def _received(message: Message, context: Context) -> Adapter:
    arrays = read_adapter(message.content)
    adapter = from_arrays(arrays.modules, arrays.head)
    if _LOCAL_HEAD in context.state.array_records and not adapter.head:
        head = context.state.array_records[_LOCAL_HEAD]
        adapter = adapter.with_head(head.to_torch_state_dict())
    return adapter
