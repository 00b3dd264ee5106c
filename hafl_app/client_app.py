"""ClientApp: answer what this node is, train what the plan says, and score what is received."""

from dataclasses import asdict

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from hafl_app import assembly
from hafl_app.config.schema import Settings
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
from hafl_app.plan import TrainPlan
from hafl_app.training.adapter import from_arrays, to_arrays
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.device import describe_device, resolve_device, threads
from hafl_app.training.evaluate import evaluate as score
from hafl_app.training.local import train as train_locally

_LOCAL_HEAD = "local-head"
app = ClientApp()


@app.query()
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
def train(message: Message, context: Context) -> Message:
    """Train the plan's components on this node's data and upload them."""
    settings, partition_id, num_partitions = _node(context)
    text = assembly.federated_text(settings, num_partitions)
    classifier = assembly.classifier(settings, len(text.label_names))
    plan, adapter = read_plan(message.content), _received(message, context)
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
    importance = {name: scores.numpy() for name, scores in result.importance.items()}
    metrics = MetricRecord(
        {
            NUM_EXAMPLES: result.num_examples,
            "loss": result.loss,
            "steps": result.steps,
            "seconds": result.seconds,
            "probe-seconds": result.probe_seconds,
            "peak-memory-mb": result.peak_memory_mb,
        }
    )
    arrays = AdapterArrays(*to_arrays(upload), importance=importance)
    return Message(adapter_content(arrays, **{METRICS: metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score what the server sent on the share of data that this node kept aside."""
    settings, partition_id, num_partitions = _node(context)
    text = assembly.federated_text(settings, num_partitions)
    classifier: LoraClassifier = assembly.classifier(settings, len(text.label_names))
    plan: TrainPlan = read_plan(message.content)
    with threads(settings.client.num_threads):
        classifier.load(_received(message, context), plan)
        scores = score(classifier, text.holdout(partition_id), settings.client.precision)
    named = {k.replace("_", "-"): v for k, v in asdict(scores).items()}
    return Message(RecordDict({METRICS: MetricRecord(named)}), reply_to=message)


def _node(context: Context) -> tuple[Settings, int, int]:
    assembly.show_log()
    config = context.node_config
    settings = assembly.settings_of_run(context.run_config)
    return settings, int(config["partition-id"]), int(config["num-partitions"])


def _received(message: Message, context: Context) -> Adapter:
    arrays = read_adapter(message.content)
    adapter = from_arrays(arrays.modules, arrays.head)
    if _LOCAL_HEAD in context.state.array_records and not adapter.head:
        head = context.state.array_records[_LOCAL_HEAD]
        adapter = adapter.with_head(head.to_torch_state_dict())
    return adapter
