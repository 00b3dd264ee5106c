"""Handlers of a node's messages: query, train, evaluate."""

from dataclasses import dataclass

import numpy as np
from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict

from hafl_app.client.answers import check_answers, score_held_out
from hafl_app.client.bandwidth import bandwidth_kbps
from hafl_app.client.closed_form import check_closed_form, losses_content, sums_content
from hafl_app.client.error_replies import Handler, errors_as_replies
from hafl_app.client.node import Job, Node
from hafl_app.client.secure_sum import answer_secure
from hafl_app.client.terms import DEVICE, SCORES
from hafl_app.client.training_reply import training_reply
from hafl_app.config.schema import RankTier
from hafl_app.data.errors import UnfitDataError
from hafl_app.data.shares import Share
from hafl_app.privacy.mechanism import PrivacyError, check_local_plan
from hafl_app.run import build
from hafl_app.training.batches import Examples
from hafl_app.training.device import (
    UNKNOWN_DEVICE,
    device_facts,
    resolve_device,
    resolve_precision,
    threads,
)
from hafl_app.training.evaluate import evaluate as score
from hafl_app.training.local import train as train_locally
from hafl_app.training.task import TrainResult
from hafl_app.wire.message_types import (
    EVALUATE_ANSWERS,
    EVALUATE_TEMPERATURES,
    QUERY_FEATURE_SUMS,
)
from hafl_app.wire.node_profile import PROFILE, UNNUMBERED, NodeProfile
from hafl_app.wire.records import FLOPS, METRICS
from hafl_app.wire.requests import read_query, read_request
from hafl_app.wire.secure_sum import is_secure


@errors_as_replies
def query(message: Message, context: Context) -> Message:
    """Answer with this node's profile, or with its part of a secure sum."""
    if is_secure(message.content):
        _check_secure(Node.of(context), asked=True)
        return answer_secure(message, context.state)
    node, request = Node.of(context), read_query(message)
    share = node.share(request.label_names)
    tier = node.rank_budget(len(share.label_names))
    client = node.settings.client
    where = resolve_device(client.device)
    device, precision = device_facts(where), resolve_precision(client.precision, where)
    if not node.terms.shares(DEVICE):
        device, precision = UNKNOWN_DEVICE, ""
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
        bandwidth_kbps=_bandwidth_kbps(node, context, tier),
        precision=precision,
        own_data=node.own is not None,
        # Only on request: the classes reveal something about a node's texts.
        label_names=share.label_names if node.own and request.label_names is None else (),
    )
    return Message(RecordDict({PROFILE: profile.to_record()}), reply_to=message)


def _bandwidth_kbps(node: Node, context: Context, tier: RankTier) -> int:
    """Return the uplink's bandwidth as the operator states it, else as the simulated device has."""
    stated = bandwidth_kbps(context.node_config)
    devices = node.settings.devices
    if stated or not devices.classes or node.partition_id == UNNUMBERED:
        return stated
    rank = max(tier.rank, *tier.rank_pattern.values(), 1)
    name = build.device_name(node.settings, node.partition_id, rank)
    return max(1, round(1000 * devices.classes[name].up_mbps))


@dataclass(frozen=True)
class Opened:
    """A training request that is ready to run: the message, its node and the job."""

    message: Message
    node: Node
    job: Job


def open_request(message: Message, context: Context) -> Opened:
    """Read and check a training request, and load what it needs."""
    node, request = Node.of(context), read_request(message)
    if node.is_private:
        check_local_plan(request.plan)  # a server may ask for more than this node gives
    _check_secure(node, asked=request.secure is not None)
    return Opened(message, node, node.prepare(request))


def reply_of(opened: Opened, result: TrainResult) -> Message:
    """Return the reply to a request whose training is done."""
    content = training_reply(opened.node, opened.job, result, opened.message.metadata.dst_node_id)
    return Message(content, reply_to=opened.message)


@errors_as_replies
def train(message: Message, context: Context) -> Message:
    """Train the plan's components on this node's data and upload them."""
    opened = open_request(message, context)
    job = opened.job
    with threads(opened.node.settings.client.num_threads):
        examples = job.share.train()
        result = train_locally(
            *(job.model, job.adapter, job.plan, examples, job.options, job.seed),
            correction=job.correction,
        )
    return reply_of(opened, result)


@errors_as_replies
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received adapter on this node's held-out share of data."""
    node, request = Node.of(context), read_request(message)
    _check_scores(node)
    job = node.prepare(request)
    with threads(node.settings.client.num_threads):
        job.model.load(job.adapter, job.plan)
        examples = _held_out(node, job.share)
        scores = score(job.model, examples, node.settings.client.precision)
    metrics = scores.to_wire()
    if node.settings.devices.classes:
        flops = build.row_flops(node.settings, len(job.share.label_names))
        metrics[FLOPS] = flops.of_scores(job.plan, np.diff(examples.offsets))
    return Message(RecordDict({METRICS: MetricRecord({**metrics})}), reply_to=message)


@errors_as_replies
def feature_sums(message: Message, context: Context) -> Message:
    """Add up the features of this node's training data under the received adapter."""
    node, request = Node.of(context), read_request(message)
    check_closed_form(node)
    job = node.prepare(request)
    with threads(node.settings.client.num_threads):
        job.model.load(job.adapter, job.plan)
        content = sums_content(node, job)
    return Message(content, reply_to=message)


@errors_as_replies
def temperature_losses(message: Message, context: Context) -> Message:
    """Score the received head at several temperatures on this node's held-out data."""
    node, request = Node.of(context), read_request(message)
    _check_scores(node)
    job = node.prepare(request)
    with threads(node.settings.client.num_threads):
        job.model.load(job.adapter, job.plan)
        content = losses_content(node, job, _held_out(node, job.share))
    return Message(content, reply_to=message)


@errors_as_replies
def answers(message: Message, context: Context) -> Message:
    """Write answers to held-out prompts with the received adapter, and reply with their scores."""
    node, request = Node.of(context), read_request(message)
    _check_scores(node)
    check_answers(node)
    job = node.prepare(request)
    with threads(node.settings.client.num_threads):
        job.model.load(job.adapter, job.plan)
        scores = score_held_out(node, job)
    return Message(RecordDict({METRICS: MetricRecord({**scores.to_wire()})}), reply_to=message)


def _check_scores(node: Node) -> None:
    """Refuse to score what was received where scores must not leave the node."""
    if node.is_private:
        raise PrivacyError("scores on private data carry no noise: refused under local_dp")
    node.terms.check_field(SCORES, "evaluation")


def _check_secure(node: Node, *, asked: bool) -> None:
    """Refuse to upload without a mask in a run that promises masks, and a mask in another one."""
    promised = node.settings.privacy.secure_aggregation
    if promised != asked:
        raise PrivacyError(
            f"privacy.secure_aggregation={str(promised).lower()}, and the request says otherwise"
        )


def _held_out(node: Node, share: Share) -> Examples:
    examples = share.holdout()
    if not len(examples.labels):
        fraction = node.settings.dataset.holdout_fraction
        reason = f"dataset.holdout_fraction={fraction}: this node has no row to evaluate on"
        raise UnfitDataError(reason, f"{share.num_examples} rows in all")
    return examples


HANDLERS: dict[str, Handler] = {
    MessageType.QUERY: query,
    MessageType.TRAIN: train,
    MessageType.EVALUATE: evaluate,
    QUERY_FEATURE_SUMS: feature_sums,
    EVALUATE_TEMPERATURES: temperature_losses,
    EVALUATE_ANSWERS: answers,
}
"""The handler of each type of message."""
