"""Importance of components, and selection of those that a client should train."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors

ScoreKind = Literal["sensitivity", "smoothed", "adalora"]


@dataclass(frozen=True)
class SensitivityAverages:
    """Averages of one module's sensitivities ``I_t = |w_t g_t|`` over updates ``t``.

    ``smoothed_t = beta1 smoothed_{t-1} + (1 - beta1) I_t`` and
    ``uncertainty_t = beta2 uncertainty_{t-1} + (1 - beta2) |I_t - smoothed_t|``, from 0.

    On a client an update is an optimizer step (`sensitivity` of the gradients), on the server it
    is a round (`round_sensitivity`). A component that was frozen is left out of the update: its
    averages stay, else it would decay for lack of a gradient and never be chosen again.

    Parameters
    ----------
    total, smoothed, uncertainty
        One value per parameter, laid out as the module's factors; float32 or wider.
    steps
        Shape ``(rank,)``, updates that each component took part in.
    beta1, beta2
        Decay, in [0, 1).

    Raises
    ------
    ValueError
        If a decay is out of range.

    Notes
    -----
    Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    arXiv:2303.10512, section 3.2; PEFT's ``RankAllocator.update_ipt``.
    """

    total: LoraFactors
    smoothed: LoraFactors
    uncertainty: LoraFactors
    steps: Int[Tensor, " rank"]
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"decays must be in [0, 1), got {self.beta1} and {self.beta2}")

    @classmethod
    def zeros(
        cls, like: LoraFactors, beta1: float = 0.85, beta2: float = 0.85
    ) -> "SensitivityAverages":
        """Return the start of the averages for a module with the sizes of ``like``."""
        dtype = torch.promote_types(like.lora_A.dtype, torch.float32)
        zeros = _elementwise(lambda x: torch.zeros_like(x, dtype=dtype), like)
        steps = like.lora_A.new_zeros(like.rank, dtype=torch.long)
        return cls(zeros, zeros, zeros, steps, beta1, beta2)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        pairs = {"total": self.total, "smoothed": self.smoothed, "uncertainty": self.uncertainty}
        factors = {
            f"{name}.{part}": getattr(pair, part)
            for name, pair in pairs.items()
            for part in ("lora_A", "lora_B")
        }
        return factors | {"steps": self.steps}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], beta1: float, beta2: float
    ) -> "SensitivityAverages":
        """Read what `to_tensors` returned."""
        total, smoothed, uncertainty = (
            LoraFactors(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"])
            for name in ("total", "smoothed", "uncertainty")
        )
        return cls(total, smoothed, uncertainty, tensors["steps"], beta1, beta2)

    def update(
        self, sensitivity: LoraFactors, indices: Sequence[int] | None = None
    ) -> "SensitivityAverages":
        """Return the averages after one more update.

        Parameters
        ----------
        sensitivity
            ``I_t`` of the components that were trained, at least 0.
        indices
            Which components these are, distinct; None means all. The others do not change.

        Raises
        ------
        ValueError
            If ``indices`` are not one distinct component for each in ``sensitivity``.
        """
        chosen = range(len(self.steps)) if indices is None else indices
        if len(chosen) != sensitivity.rank or len(set(chosen)) != len(chosen):
            raise ValueError(f"{sensitivity.rank} components need distinct indices, got {chosen}")
        b1, b2 = self.beta1, self.beta2
        total, smoothed, uncertainty = (
            x if indices is None else x.select(indices)
            for x in (self.total, self.smoothed, self.uncertainty)
        )
        total = _elementwise(lambda t, i: t + i, total, sensitivity)
        smoothed = _elementwise(lambda s, i: b1 * s + (1 - b1) * i, smoothed, sensitivity)
        uncertainty = _elementwise(
            lambda u, i, s: b2 * u + (1 - b2) * (i - s).abs(), uncertainty, sensitivity, smoothed
        )
        slots = torch.tensor(chosen, dtype=torch.long, device=self.steps.device)
        steps = self.steps.index_add(0, slots, torch.ones_like(slots))
        if indices is not None:
            total = self.total.replace(indices, total)
            smoothed = self.smoothed.replace(indices, smoothed)
            uncertainty = self.uncertainty.replace(indices, uncertainty)
        return SensitivityAverages(total, smoothed, uncertainty, steps, b1, b2)


def sensitivity(factors: LoraFactors, gradients: LoraFactors) -> LoraFactors:
    """Return ``I = |w g|`` for every parameter.

    The loss changes by about ``I`` if the parameter is set to 0 (AdaLoRA, arXiv:2303.10512,
    equation 8).

    Parameters
    ----------
    factors
        The parameters ``w``, as trained: the PEFT scaling taken out of ``lora_B``.
    gradients
        ``g``, laid out as ``factors``.

    Returns
    -------
    LoraFactors
        Detached, so that averages of it keep no computation graph alive.
    """
    return _elementwise(lambda w, g: (w.detach() * g.detach()).abs(), factors, gradients)


def round_sensitivity(
    before: LoraFactors, after: LoraFactors, learning_rate: float, lora_B_lr_ratio: float = 1.0
) -> LoraFactors:
    """Return ``I = |w (w - w') / eta|`` with ``w`` before and ``w'`` after a round.

    A round's change stands in for the gradient, so that the server needs no extra upload. In the
    first round ``lora_B = 0``, so only ``lora_A`` counts.

    Parameters
    ----------
    before, after
        The components that were trained, with the PEFT scaling ``s`` taken out of ``lora_B``
        (left in, the part of ``lora_B`` grows by ``s^2`` and that of ``lora_A`` does not).
    learning_rate
        ``eta``, above 0; a common factor that does not change the ranking.
    lora_B_lr_ratio
        Learning rate of ``lora_B`` over that of ``lora_A``, above 0.

    Notes
    -----
    After Su et al., "HAFLQ: Heterogeneous Adaptive Federated LoRA Fine-tuned LLM with
    Quantization", arXiv:2411.06581v2, section IV-A, as others report it: its body was not
    available to us. That ``w`` is the value before the round is our reading.
    """
    return LoraFactors(
        (before.lora_A * (before.lora_A - after.lora_A)).abs() / learning_rate,
        (before.lora_B * (before.lora_B - after.lora_B)).abs() / (learning_rate * lora_B_lr_ratio),
    )


def component_scores(
    averages: SensitivityAverages, kind: ScoreKind, *, bias_correction: bool = False
) -> Float[Tensor, " rank"]:
    """Return one importance per component: the mean over its column plus that over its row.

    ``Imp(i) = mean_j s(lora_B[j, i]) + mean_j s(lora_A[i, j])``. A factor without features, see
    `LoraFactors.only`, adds nothing.

    Parameters
    ----------
    averages
        After any number of updates; a component without one scores 0.
    kind
        ``s`` is, for ``sensitivity``, the mean of ``I`` over the updates; for ``smoothed``, its
        moving average; for ``adalora``, moving average times uncertainty.
    bias_correction
        Divide each moving average by ``1 - beta^steps``. It makes ``smoothed`` unbiased for any
        number of steps, so that clients are comparable. For ``adalora`` it removes only the zero
        start of the uncertainty, not that of the average inside ``|I - smoothed|``. Without it,
        as in AdaLoRA. No effect on ``sensitivity``.

    Returns
    -------
    Tensor
        Shape ``(rank,)``, float64, at least 0.

    Raises
    ------
    ValueError
        If ``kind`` is unknown.
    """
    steps = averages.steps.double()
    smoothed = averages.smoothed
    if kind == "sensitivity":
        return _component_means(averages.total) / steps.clamp(min=1)
    if kind == "smoothed":
        scores, correction = _component_means(smoothed), 1 - averages.beta1**steps
    elif kind == "adalora":
        product = _elementwise(lambda s, u: s.double() * u, smoothed, averages.uncertainty)
        scores = _component_means(product)
        correction = (1 - averages.beta1**steps) * (1 - averages.beta2**steps)
    else:
        raise ValueError(f"unknown kind of score {kind!r}: sensitivity, smoothed or adalora")
    return scores / correction.where(steps > 0, 1.0) if bias_correction else scores


def magnitude_scores(factors: LoraFactors) -> Float[Tensor, " rank"]:
    """Return ``||b_i|| ||a_i||``, the Frobenius norm of each component, in float64."""
    return _norms(factors.lora_B, dim=0) * _norms(factors.lora_A, dim=1)


def contribution_scores(before: LoraFactors, after: LoraFactors) -> Float[Tensor, " rank"]:
    """Return ``||b'_i - b_i|| ||a'_i||``, what training ``lora_B`` did to each component.

    Parameters
    ----------
    before, after
        The same components before and after local training.

    Returns
    -------
    Tensor
        Shape ``(rank,)``, float64.

    Notes
    -----
    Koo et al., "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
    Clients" (LoRA-A2), arXiv:2410.22815: the score of rounds that train only ``lora_B``, where
    ``a' = a``. Differs from the paper: both may have moved; the row is then the one after
    training, which the new column was fitted with.
    """
    change = after.lora_B.double() - before.lora_B.double()
    return _norms(change, dim=0) * _norms(after.lora_A, dim=1)


def product_change_scores(before: LoraFactors, after: LoraFactors) -> Float[Tensor, " rank"]:
    """Return ``||b'_i a'_i - b_i a_i||_F``, the change of each component's product.

    Where one factor alone was trained, ``||b'_i - b_i|| ||a_i||`` or ``||b_i|| ||a'_i - a_i||``.

    Parameters
    ----------
    before, after
        The same components before and after training.

    Returns
    -------
    Tensor
        Shape ``(rank,)``, float64, at least 0.

    Notes
    -----
    Koo et al., "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
    Clients" (LoRA-A2), arXiv:2410.22815, whose rounds train one factor: there it is the paper's
    score.
    """
    a, b = before.lora_A.double(), before.lora_B.double()
    new_a, change_b = after.lora_A.double(), after.lora_B.double() - b
    change_a = new_a - a
    # b'a' - ba = (b' - b) a' + b (a' - a): nothing cancels where the change is small.
    squares = (
        change_b.square().sum(0) * new_a.square().sum(1)
        + b.square().sum(0) * change_a.square().sum(1)
        + 2 * (change_b * b).sum(0) * (new_a * change_a).sum(1)
    )
    return squares.clamp(min=0).sqrt()


def select_components(
    scores: Float[Tensor, " rank"],
    count: int,
    *,
    explore: float = 0.0,
    generator: torch.Generator,
) -> tuple[int, ...]:
    """Return the ``count`` components with the highest scores, some of them left to chance.

    Ties are broken at random: in the first round, with ``lora_B = 0``, all scores are equal.
    ``explore * count`` slots, rounded up or down at random so that the share is right on average,
    go to components drawn from all that the other slots have not taken. So frozen ones come back.

    Parameters
    ----------
    scores
        Finite.
    count
        In ``[0, rank]``.
    explore
        Share of the slots left to chance, in [0, 1].
    generator
        Source of randomness, on the CPU.

    Returns
    -------
    tuple
        Distinct indices, ascending.

    Raises
    ------
    ValueError
        If ``scores`` are not finite, or ``count`` or ``explore`` is out of range.
    """
    if not 0 <= count <= len(scores):
        raise ValueError(f"count must be in [0, {len(scores)}], got {count}")
    if not 0 <= explore <= 1:
        raise ValueError(f"explore must be in [0, 1], got {explore}")
    if not scores.isfinite().all():
        raise ValueError(f"scores must be finite, got {scores.tolist()}")
    shuffled = torch.randperm(len(scores), generator=generator)
    order = shuffled[scores.detach().cpu()[shuffled].argsort(descending=True, stable=True)]
    dice = torch.rand((), generator=generator, dtype=torch.float64)
    best = count - int(explore * count + dice.item())
    rest = order[best:]
    drawn = rest[torch.randperm(len(rest), generator=generator)[: count - best]]
    return tuple(sorted([*order[:best].tolist(), *drawn.tolist()]))


def select_over_model(
    scores: Mapping[str, Tensor],
    total: int,
    *,
    explore: float = 0.0,
    generator: torch.Generator,
) -> dict[str, tuple[int, ...]]:
    """Return the ``total`` best pairs of module and component over the whole model.

    The rules are those of `select_components`, on the scores of all modules together; a module
    may get none. The order of ``scores`` does not matter.

    Parameters
    ----------
    scores
        Module name to its components' scores.
    total
        Components over all modules, in ``[0, sum of ranks]``.

    Returns
    -------
    dict
        For every module, its chosen components, ascending.
    """
    pairs = [(name, i) for name in sorted(scores) for i in range(len(scores[name]))]
    joined = torch.cat([scores[name].detach().cpu().double() for name in sorted(scores)])
    chosen: dict[str, list[int]] = {name: [] for name in scores}
    for position in select_components(joined, total, explore=explore, generator=generator):
        name, component = pairs[position]
        chosen[name].append(component)
    return {name: tuple(components) for name, components in chosen.items()}


def _elementwise(function: Callable[..., Tensor], *values: LoraFactors) -> LoraFactors:
    """Return ``function`` of all the lora_A, and of all the lora_B."""
    return LoraFactors(function(*(v.lora_A for v in values)), function(*(v.lora_B for v in values)))


def _component_means(values: LoraFactors) -> Float[Tensor, " rank"]:
    """Return the mean over each column of lora_B plus the mean over each row of lora_A."""
    return _mean(values.lora_B, dim=0) + _mean(values.lora_A, dim=1)


def _mean(vectors: Tensor, dim: int) -> Float[Tensor, " rank"]:
    """Return the means along ``dim`` in float64; 0 of a factor without features."""
    values = vectors.double()
    return values.mean(dim) if values.shape[dim] else values.sum(dim)


def _norms(vectors: Tensor, dim: int) -> Float[Tensor, " rank"]:
    """Return the norms of the vectors along ``dim``, in float64."""
    norms: Tensor = torch.linalg.vector_norm(vectors.double(), dim=dim)
    return norms
