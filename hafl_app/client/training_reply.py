"""Reply to a training request: the trained adapter as the plan uploads it, and metrics."""

from flwr.app import MetricRecord, RecordDict

from hafl_app.client.error_feedback import encode_with_feedback
from hafl_app.client.node import Job, Node
from hafl_app.client.own_factors import keep_lora_B
from hafl_app.client.secure_sum import masked, with_unchosen
from hafl_app.client.terms import DEVICE, LOSSES, TIMES
from hafl_app.lowrank.factors import Adapter
from hafl_app.privacy.mechanism import NoiseSource, privatize_upload, trained_part
from hafl_app.run import build
from hafl_app.training.task import TrainResult
from hafl_app.wire.records import (
    FLOPS,
    METRICS,
    NUM_EXAMPLES,
    SECONDS,
    STEPS,
    adapter_content,
)
from hafl_app.wire.secure_sum import VECTOR, write_vector


def training_reply(node: Node, job: Job, result: TrainResult, node_id: int) -> RecordDict:
    """Return the content of the reply; what is the client's own stays in the node's state.

    Under ``privacy=local_dp`` the upload is clipped and carries the node's own noise. As a part of
    a secure sum it is masked.

    Parameters
    ----------
    node_id
        Flower's number of this node, as the others know it.
    """
    if job.plan.head == "local":
        node.keep_head(result.adapter)
    keep_lora_B(node.state, result.adapter, result.plan)
    upload = result.adapter.only(result.plan.uploaded_factors)
    upload = upload if job.plan.uploads_head else upload.with_head({})
    if node.is_private:
        upload = _privatized(node, job, upload)
    if job.secure is not None:
        before = trained_part(job.adapter, job.plan)
        upload = with_unchosen(upload, before, result.plan, job.plan)
        vector = masked(node.state, node_id, job.secure, job.plan, upload, before)
        return RecordDict(
            {VECTOR: write_vector(vector, sorted(vector)), METRICS: _metrics(result, node, job)}
        )
    importance = {name: scores.numpy() for name, scores in result.importance.items()}
    arrays = encode_with_feedback(
        node.state, upload, job.adapter, result.plan, importance, job.seed
    )
    return adapter_content(arrays, **{METRICS: _metrics(result, node, job)})


def _privatized(node: Node, job: Job, upload: Adapter) -> Adapter:
    privacy = build.privacy_options(node.settings)
    noise = NoiseSource(privacy.noise_key)
    generator = noise.generator(job.server_round, f"upload/{job.number}", upload)
    return privatize_upload(upload, trained_part(job.adapter, job.plan), privacy, generator)


def _metrics(result: TrainResult, node: Node, job: Job) -> MetricRecord:
    metrics: dict[str, int | float] = {NUM_EXAMPLES: result.num_examples}
    if node.is_private:  # losses, times and memory follow from the texts, and carry no noise
        return MetricRecord(dict(metrics))
    if node.terms.shares(LOSSES):
        metrics["loss"] = result.loss
    if node.terms.shares(TIMES):
        metrics |= {
            STEPS: result.steps,
            SECONDS: result.seconds,
            "probe-seconds": result.probe_seconds,
            "out-of-time": int(result.out_of_time),
        }
    if node.settings.devices.classes:
        flops = build.row_flops(node.settings, len(job.share.label_names))
        metrics[FLOPS] = flops.of_passes(result.passes)
    if node.terms.shares(DEVICE):
        metrics |= {
            "peak-memory-mb": result.peak_memory_mb,
            "micro-batch-size": result.micro_batch_size,
        }
    return MetricRecord(dict(metrics))
