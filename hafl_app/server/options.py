"""What holds for a whole run, whatever the method."""

from dataclasses import dataclass, field

from hafl_app.plan import HeadPolicy, NumberFormat
from hafl_app.privacy.mechanism import PrivacyOptions


@dataclass(frozen=True)
class FederationOptions:
    """What holds for a whole run, whatever the method.

    Parameters
    ----------
    seed
        Decides who takes part in which round.
    fraction_train, fraction_evaluate
        Share of the nodes per round, in [0, 1].
    evaluate_every
        Rounds between evaluations on the nodes, at least 1; the last round always counts.
    local_epochs, max_steps
        Length of local training, see `TrainPlan`.
    head
        What happens to the classification head, see `TrainPlan`.
    lora_alpha, scaling
        PEFT's ``lora_alpha``, and how it becomes the scaling: ``constant``
        (``alpha / max_rank``), ``per_rank`` (``alpha / r``) or ``rslora`` (``alpha / sqrt(r)``).
    timeout_s
        How long to wait for the replies of a round.
    min_replies, max_retries
        A round with fewer replies that count is repeated, so many times at most.
    max_norm_ratio
        Robust deviations above the round's median from which an update is refused; None is never.
    clip_ratio
        Multiple of the round's median norm that updates are scaled down to; None is never.
    robust, trim_fraction
        ``none``, ``median`` or ``trimmed_mean`` over the contributors of a component.
    streaming, stream_buffer
        Whether replies are folded in as they arrive, and how many are held at once, at least 1.
    quarantine_after, quarantine_rounds
        Refused replies in a row that leave a node out (0: never), and for how many rounds.
    upload
        Numbers of the uploaded factors, see `TrainPlan`.
    error_feedback
        Whether clients carry what rounding loses over to their next upload; None is wherever it
        has a meaning.
    privacy
        How private the run is; see docs/privacy.md.
    """

    seed: int = 0
    fraction_train: float = 1.0
    fraction_evaluate: float = 1.0
    evaluate_every: int = 1
    num_rounds: int = 1
    local_epochs: int = 1
    max_steps: int = 0
    head: HeadPolicy = "averaged"
    lora_alpha: float = 16.0
    scaling: str = "constant"
    timeout_s: float = 3600.0
    min_replies: int = 1
    max_retries: int = 2
    max_norm_ratio: float | None = 10.0
    clip_ratio: float | None = None
    robust: str = "none"
    trim_fraction: float = 0.2
    streaming: bool = False
    stream_buffer: int = 16
    quarantine_after: int = 3
    quarantine_rounds: int = 5
    upload: NumberFormat = "fp32"
    error_feedback: bool | None = None
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
