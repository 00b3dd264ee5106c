"""Settings of differential privacy and of secure aggregation."""

from dataclasses import dataclass

from hafl_app.fields import choice, number


@dataclass(frozen=True)
class PrivacySettings:
    """Privacy of what clients upload; docs/privacy.md describes what it covers.

    Parameters
    ----------
    kind
        ``none``; ``central_dp``: the server clips each client's change and adds Gaussian noise to
        their sum; ``local_dp``: each client clips and adds noise before it uploads.
    clip_norm
        ``C``: L2 norm that a client's whole change is clipped to.
    noise_multiplier
        ``z``: standard deviation of the noise, in units of ``clip_norm``.
    delta
        ``delta`` of (epsilon, delta)-differential privacy.
    max_epsilon
        The run stops before it would spend more at ``delta``; null: epsilon is only reported.
    noise_seed
        Seed of the noise. It makes a simulation repeatable, and its noise no secret; null draws
        the noise from the system's randomness.
    secure_aggregation
        Whether uploads are masked, so that the server learns their sums alone. It is no
        differential privacy, and the two do not go together.
    largest_change
        ``secure_aggregation``: largest change of a number in a client's training, also times the
        weight that a client gives itself, and the largest such weight. The changes are whole
        numbers of steps of this range; a client beyond it fails.
    """

    kind: str = choice("none", "none", "central_dp", "local_dp")
    clip_norm: float = number(1.0, above=0)
    noise_multiplier: float = number(1.0, above=0)
    delta: float = number(1e-5, above=0, below=1)
    max_epsilon: float | None = number(None, above=0, resumable=True)
    noise_seed: int | None = number(None, at_least=0)
    secure_aggregation: bool = False
    largest_change: float = number(10.0, above=0)
