"""Settings of differential privacy."""

from dataclasses import dataclass

from hafl_app.fields import choice, number


@dataclass
class PrivacySettings:
    """Differential privacy of the adapter; see docs/privacy.md for what it covers.

    `central_dp`: the server clips each client's update to norm `clip_norm` and adds Gaussian noise
    of `noise_multiplier` times that to the sum. `local_dp`: each client does so before it
    uploads. The run stops when `max_epsilon` at `delta` would be exceeded (null: it is only
    reported). `noise_seed` null draws the noise from the system; a number makes a simulation
    repeatable, and its noise no secret.
    """

    kind: str = choice("none", "none", "central_dp", "local_dp")
    clip_norm: float = number(1.0, above=0)
    noise_multiplier: float = number(1.0, above=0)
    delta: float = number(1e-5, above=0, below=1)
    max_epsilon: float | None = number(None, above=0)
    noise_seed: int | None = number(None, at_least=0)
