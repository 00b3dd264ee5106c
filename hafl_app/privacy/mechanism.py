"""Differential privacy of what clients upload: clipping and noise.

`docs/privacy.md` describes what is protected from whom; `accounting.py` computes epsilon.
"""

import hashlib
import hmac
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hafl_app.lowrank.change import change_of, total_norm
from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.privacy.settings import PrivacySettings


class PrivacyError(ValueError):
    """Settings, a plan or an update that cannot be made private, with the reason."""


@dataclass(frozen=True)
class PrivacyOptions(PrivacySettings):
    """The privacy settings of a run with the key of its noise.

    Parameters
    ----------
    noise_key
        The secret from which `NoiseSource` and `sample_poisson` draw. Who has it can take the
        noise off again. It belongs in the checkpoint, and in no log.
    """

    noise_key: str = field(default="", repr=False)

    @property
    def noise_std(self) -> float:
        """Standard deviation of each coordinate's noise, ``z C``."""
        return self.noise_multiplier * self.clip_norm


# ---- noise ---------------------------------------------------------------------------------


def new_noise_key(noise_seed: int | None) -> str:
    """Return a key for the noise: from the system's randomness, or from a seed, then no secret."""
    return secrets.token_hex(32) if noise_seed is None else f"seed {noise_seed}"


@dataclass(frozen=True)
class NoiseGenerator:
    """The noise of one release: each tensor's follows from the seed and the tensor's name."""

    seed: bytes = field(repr=False)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal noise of a shape, float64.

        The inverse of the normal distribution at 52 random bits from SHAKE-256, so within 8.21
        standard deviations; what that cuts off has a chance of 2e-16 a coordinate.
        """
        count = math.prod(shape)
        bits = hashlib.shake_256(self.seed + name.encode()).digest(8 * count)
        uniform = ((np.frombuffer(bits, dtype="<u8") >> 12) + 0.5) * 2.0**-52
        noise: Tensor = torch.special.ndtri(torch.from_numpy(uniform))
        return noise.reshape(tuple(shape))


class NoiseSource:
    """Gaussian noise that only the holder of the key can foresee, and the holder can repeat.

    From the standard library's SHAKE-256 and not from torch's or NumPy's generators: their state
    can be computed from enough of their output, and noise is published with every adapter. Not
    hardened against attacks on floating-point Gaussian samples (Mironov, "On Significance of the
    Least Significant Bits for Differential Privacy", CCS 2012; Jin et al., "Are We There Yet?
    Timing and Floating-Point Attacks on Differential Privacy Systems", arXiv:2112.05307).

    Parameters
    ----------
    key
        See `PrivacyOptions.noise_key`.

    Raises
    ------
    PrivacyError
        If the key is empty.
    """

    def __init__(self, key: str) -> None:
        if not key:
            raise PrivacyError("the noise key is empty, expected one of `new_noise_key`")
        self._key = key.encode()

    def generator(
        self, server_round: int, label: str, content: Adapter | None = None
    ) -> NoiseGenerator:
        """Return the noise of one release.

        Parameters
        ----------
        server_round, label
            Distinguishes releases, such as the round and the partition of an upload.
        content
            Values that the noise will be added to. If a resumed run computes a round anew, equal
            content gets equal noise and so the same release; other content gets fresh noise. With
            equal noise, the difference of two releases would show one client's change without any.
        """
        digest = hmac.new(self._key, f"noise/{server_round}/{label}".encode(), "sha256")
        for name, tensor in sorted((content or Adapter({})).tensors().items()):
            digest.update(f"/{name}/{tuple(tensor.shape)}/".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return NoiseGenerator(digest.digest())


# ---- clipping and noise on adapters --------------------------------------------------------


def trained_part(adapter: Adapter, plan: TrainPlan) -> Adapter:
    """Select the parts of an adapter that a client trains and later uploads.

    The trainable components in the plan's order, the trained factors alone, and the head if it
    travels. So nothing else counts in the norm of its change, or gets noise.
    """
    modules = {n: f.select(plan.modules[n].trainable_slots) for n, f in adapter.modules.items()}
    trained = Adapter(modules, adapter.head if plan.uploads_head else {})
    return trained.only(plan.uploaded_factors)


def clipped_change(after: Adapter, before: Adapter, clip_norm: float) -> Adapter:
    """Return ``min(1, C / ||after - before||) (after - before)`` in float64.

    The norm is the L2 norm over factors and head together, so a client's rank does not change the
    bound. The change and not ``before`` plus it: rounded to float32 beside large values, it would
    exceed the bound.

    Parameters
    ----------
    after, before
        Of the same modules, head and shapes.
    clip_norm
        ``C``, above 0.

    Raises
    ------
    PrivacyError
        If the two do not fit together, or the change is not finite.
    """
    try:
        change = change_of(after, before)
    except ValueError as error:
        raise PrivacyError(str(error)) from error
    norm = total_norm(change)
    if not math.isfinite(norm):
        raise PrivacyError(f"a change of norm {norm}, expected a finite one")
    factor = min(1.0, clip_norm / norm) if norm else 1.0
    return Adapter.from_tensors({n: factor * tensor for n, tensor in change.tensors().items()})


def add_noise(adapter: Adapter, std: float, generator: NoiseGenerator) -> Adapter:
    """Return the adapter with independent noise of this standard deviation on every number."""
    noisy = {
        name: tensor.double() + std * generator.normal(name, tensor.shape).to(tensor.device)
        for name, tensor in adapter.tensors().items()
    }
    return Adapter.from_tensors(noisy)


def privatize_upload(
    after: Adapter, before: Adapter, options: PrivacyOptions, generator: NoiseGenerator
) -> Adapter:
    """Return a client's upload under local privacy: ``before + clipped change + noise``.

    The noise is ``N(0, (z C)^2)`` on each number. One generator serves one upload: with the same
    noise twice, the difference of two uploads would be bare.

    Parameters
    ----------
    after
        Trained adapter, without what is not uploaded.
    before
        The same components as received, see `trained_part`.

    Returns
    -------
    Adapter
        float32; rounding after the noise gives nothing away.
    """
    change = clipped_change(after, before, options.clip_norm)
    noisy = add_noise(change, options.noise_std, generator).tensors()
    upload = {n: (start.double() + noisy[n]).float() for n, start in before.tensors().items()}
    return Adapter.from_tensors(upload)


def check_local_plan(plan: TrainPlan) -> None:
    """Refuse a plan that makes a client upload more of its data than the noised change.

    Raises
    ------
    PrivacyError
        If it asks for importance scores, for components or ranks that training decides, or for
        error feedback.
    """
    if plan.importance != "none":
        raise PrivacyError(
            f"the plan asks for importance={plan.importance}, measured on private data and "
            "uploaded without noise: privacy=local_dp needs a selection without it, such as "
            "strategy.source=server, strategy.importance=magnitude or strategy.selection=random"
        )
    if plan.choice is not None:
        raise PrivacyError(
            "the plan lets the client choose its components by its private data, and the choice "
            "is uploaded without noise: privacy=local_dp needs a method whose plans choose"
        )
    if plan.density < 1:
        raise PrivacyError(
            "the plan has the client upload the largest numbers of its change, and which they are "
            "is not noised: privacy=local_dp needs a method with dense uploads"
        )
    if plan.tail is not None and plan.tail.prune:
        raise PrivacyError(
            "the plan lets training decide the uploaded rank, which is not noised: "
            "privacy=local_dp needs strategy.pruning=false"
        )
    if plan.error_feedback:
        raise PrivacyError(
            "the plan carries what rounding lost of one upload over to the next, which couples "
            "them: privacy=local_dp needs federation.error_feedback=false"
        )
