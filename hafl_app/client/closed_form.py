"""What a node sends for a head in closed form: sums of features, and losses by temperature."""

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from hafl_app.client.node import Job, Node
from hafl_app.client.permissions import NotAllowedError
from hafl_app.client.terms import SUMS as SUMS_FIELD
from hafl_app.training.batches import Examples
from hafl_app.training.evaluate import temperature_losses
from hafl_app.training.features import sums_of
from hafl_app.training.settings import CLOSED_FORM
from hafl_app.wire.feature_sums import SUMS, write_losses, write_sums
from hafl_app.wire.records import METRICS, NUM_EXAMPLES


def check_closed_form(node: Node) -> None:
    """Refuse a request for sums in a run that has not said so, or that the operator withholds.

    Raises
    ------
    NotAllowedError
        Without noise the sums of a few examples reveal their features: a run that uses them says so
        in its settings, which the node's operator agrees to.
    """
    if (head := node.settings.model.head) != CLOSED_FORM:
        raise NotAllowedError(f"sums of features are asked for in a run of model.head={head}")
    if node.settings.privacy.secure_aggregation:
        raise NotAllowedError("sums of features have no masks, which the run promises")
    node.terms.check_field(SUMS_FIELD, f"model.head={CLOSED_FORM}")


def sums_content(node: Node, job: Job) -> RecordDict:
    """Return the sums over this node's training examples under the factors in the model."""
    settings, examples = node.settings, job.share.train()
    closed_form = settings.model.closed_form
    sums = sums_of(
        job.model,
        examples,
        closed_form,
        precision=settings.client.precision,
        seed=settings.seed,
    )
    return _content(write_sums(sums, closed_form.numbers), len(examples.labels))


def losses_content(node: Node, job: Job, examples: Examples) -> RecordDict:
    """Return the summed cross entropy of the head in the model at each temperature."""
    losses = temperature_losses(job.model, examples, node.settings.client.precision)
    return _content(write_losses(losses), len(examples.labels))


def _content(record: ArrayRecord, num_examples: int) -> RecordDict:
    return RecordDict({SUMS: record, METRICS: MetricRecord({NUM_EXAMPLES: num_examples})})
