"""Handlers of a node's messages: query, train, evaluate."""

from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict

from hafl_app.client.bandwidth import bandwidth_kbps
from hafl_app.client.error_feedback import encode_with_feedback
from hafl_app.client.error_replies import Handler, errors_as_replies
from hafl_app.client.local_head import keep_local_head, with_local_head
from hafl_app.client.node import Node
from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.privacy.mechanism import (
    NoiseSource,
    PrivacyError,
    check_local_plan,
    privatize_upload,
    trained_part,
)
from hafl_app.run import build
from hafl_app.seeds import client_seed
from hafl_app.training.device import device_facts, resolve_device, threads
from hafl_app.training.evaluate import evaluate as score
from hafl_app.training.local import TrainResult
from hafl_app.training.local import train as train_locally
from hafl_app.wire.node_profile import PROFILE, NodeProfile
from hafl_app.wire.records import METRICS, NUM_EXAMPLES, SECONDS, adapter_content
from hafl_app.wire.requests import read_query, read_request


@errors_as_replies
def query(message: Message, context: Context) -> Message:
    """Answer with this node's profile."""
    node, request = Node.of(context), read_query(message)
    share = node.share(request.label_names)
    tier = node.rank_budget(len(share.label_names))
    device = device_facts(resolve_device(node.settings.client.device))
    has_own_data = node.own is not None
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
        own_data=has_own_data,
        # Only on request: the classes reveal something about a node's texts.
        label_names=share.label_names if has_own_data and request.label_names is None else (),
    )
    return Message(RecordDict({PROFILE: profile.to_record()}), reply_to=message)


@errors_as_replies
def train(message: Message, context: Context) -> Message:
    """Train the plan's components on this node's data and upload them."""
    node, request = Node.of(context), read_request(message)
    plan, number = node.limits.limit_plan(request.plan), node.number(request)
    if node.is_private:
        check_local_plan(plan)  # a server may ask for more than this node gives
    share = node.share(request.label_names)
    received = with_local_head(request.adapter, context.state)
    seed = client_seed(node.settings.seed, request.server_round, number)
    model = node.model(share)
    with threads(node.settings.client.num_threads):
        options = node.train_options(plan)
        result = train_locally(model, received, plan, share.train(), options, seed)
    if plan.head == "local":
        keep_local_head(context.state, result.adapter)
    upload = result.adapter if plan.head == "averaged" else result.adapter.with_head({})
    if node.is_private:
        upload = _privatized(node, upload, received, plan, request.server_round, number)
    importance = {name: scores.numpy() for name, scores in result.importance.items()}
    arrays = encode_with_feedback(context.state, upload, received, plan, importance, seed)
    metrics = _metrics(result, node.is_private)
    return Message(adapter_content(arrays, **{METRICS: metrics}), reply_to=message)


@errors_as_replies
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received adapter on this node's held-out share of data."""
    node, request = Node.of(context), read_request(message)
    if node.is_private:
        raise PrivacyError("scores on private data carry no noise: refused under local_dp")
    share = node.share(request.label_names)
    model = node.model(share)
    with threads(node.settings.client.num_threads):
        model.load(with_local_head(request.adapter, context.state), request.plan)
        scores = score(model, share.holdout(), node.settings.client.precision)
    return Message(RecordDict({METRICS: MetricRecord({**scores.to_wire()})}), reply_to=message)


def _privatized(
    node: Node,
    upload: Adapter,
    received: Adapter,
    plan: TrainPlan,
    server_round: int,
    number: int,
) -> Adapter:
    """Clip an upload's change and add this node's noise of the round to it."""
    privacy = build.privacy_options(node.settings)
    generator = NoiseSource(privacy.noise_key).generator(server_round, f"upload/{number}", upload)
    return privatize_upload(upload, trained_part(received, plan), privacy, generator)


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


HANDLERS: dict[str, Handler] = {
    MessageType.QUERY: query,
    MessageType.TRAIN: train,
    MessageType.EVALUATE: evaluate,
}
"""The handler of each type of message."""
