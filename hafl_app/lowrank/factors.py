"""Low-rank factors of one adapted weight, and the adapter they make up together."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hafl_app.plan_parts.module_plan import TrainedFactors

# PEFT draws lora_A from U(-1/sqrt(in), 1/sqrt(in)): a row's expected norm is 1/sqrt(3).
INITIAL_ROW_NORM = 3**-0.5


@dataclass(frozen=True)
class LoraFactors:
    """The update of one weight, ``delta_weight = lora_B @ lora_A``.

    Component ``i`` is the rank-1 matrix made of column ``i`` of ``lora_B`` and row ``i`` of
    ``lora_A``. The PEFT scaling is already inside ``lora_B``.

    Parameters
    ----------
    lora_A
        Shape ``(rank, in_features)``.
    lora_B
        Shape ``(out_features, rank)``, same dtype and device as ``lora_A``.

    Raises
    ------
    ValueError
        If the factors are no matrices, or disagree on the rank.
    """

    # Plain tensors: the checks below must answer, in the tests as in production.
    lora_A: Tensor  # (rank, in_features)
    lora_B: Tensor  # (out_features, rank)

    def __post_init__(self) -> None:
        if self.lora_A.ndim != 2 or self.lora_B.ndim != 2:
            raise ValueError(
                f"lora_A {tuple(self.lora_A.shape)} and lora_B {tuple(self.lora_B.shape)} "
                "must be matrices"
            )
        if self.lora_A.shape[0] != self.lora_B.shape[1]:
            raise ValueError(
                f"lora_A {tuple(self.lora_A.shape)} and lora_B {tuple(self.lora_B.shape)} "
                "disagree on the rank"
            )

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.lora_A.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the adapted layer's input."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the adapted layer's output."""
        return self.lora_B.shape[0]

    def delta_weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return the dense update. For tests and merging; strategies stay with the factors."""
        return self.lora_B @ self.lora_A

    def select(self, indices: Iterable[int]) -> "LoraFactors":
        """Return copies of the components ``indices``, in that order."""
        index = torch.tensor(list(indices), dtype=torch.long, device=self.lora_A.device)
        return LoraFactors(self.lora_A[index], self.lora_B[:, index])

    def replace(self, indices: Iterable[int], factors: "LoraFactors") -> "LoraFactors":
        """Return a copy in which the components ``indices`` are those of ``factors``."""
        index: Int[Tensor, " k"] = torch.tensor(
            list(indices), dtype=torch.long, device=self.lora_A.device
        )
        lora_A, lora_B = self.lora_A.clone(), self.lora_B.clone()
        lora_A[index] = factors.lora_A
        lora_B[:, index] = factors.lora_B
        return LoraFactors(lora_A, lora_B)

    def only(self, trained: TrainedFactors) -> "LoraFactors":
        """Return the trained factors; one that is not trained has no features left.

        It keeps the rank: lora_A of shape ``(rank, 0)``, or lora_B of shape ``(0, rank)``.
        """
        if trained == "both":
            return self
        if trained == "A":
            return LoraFactors(self.lora_A, self.lora_B[:0])
        return LoraFactors(self.lora_A[:, :0], self.lora_B)

    def filled(self, other: "LoraFactors") -> "LoraFactors":
        """Return both factors, the one that `only` has left out being the other's."""
        if self.in_features and self.out_features:
            return self
        return LoraFactors(
            self.lora_A if self.in_features else other.lora_A,
            self.lora_B if self.out_features else other.lora_B,
        )

    def padded(self, rank: int) -> "LoraFactors":
        """Return factors of the same ``delta_weight`` with ``rank`` components, the last ones zero.

        Raises
        ------
        ValueError
            If there are more components than ``rank``.
        """
        if rank < self.rank:
            raise ValueError(f"rank {rank}: the factors have {self.rank} components")
        more = rank - self.rank
        return LoraFactors(
            torch.cat([self.lora_A, self.lora_A.new_zeros(more, self.in_features)]),
            torch.cat([self.lora_B, self.lora_B.new_zeros(self.out_features, more)], dim=1),
        )

    def joined(self, other: "LoraFactors") -> "LoraFactors":
        """Return these components, and behind them those of ``other``: the sum of both."""
        return LoraFactors(
            torch.cat([self.lora_A, other.lora_A]), torch.cat([self.lora_B, other.lora_B], dim=1)
        )

    def scale(self, factor: float) -> "LoraFactors":
        """Return factors whose ``delta_weight`` is ``factor`` times this one's."""
        return LoraFactors(self.lora_A, self.lora_B * factor)

    def squared_norm(self) -> Float[Tensor, ""]:
        """Return ``||lora_B @ lora_A||_F^2`` in float64 from rank x rank Gram matrices.

        ``||BA||_F^2 = trace((B^T B)(A A^T))``, in O(rank^2 (out + in)).
        """
        lora_A, lora_B = self.lora_A.double(), self.lora_B.double()
        return ((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum().clamp(min=0)

    def norm(self) -> Float[Tensor, ""]:
        """Return ``||lora_B @ lora_A||_F`` in float64, see `squared_norm`."""
        return self.squared_norm().sqrt()


@dataclass(frozen=True)
class Adapter:
    """The exchanged part of a model: the factors of every adapted module, and the task's head.

    Parameters
    ----------
    modules
        Module name to factors.
    head
        Parameter name to tensor; empty if the head does not travel.
    """

    modules: Mapping[str, LoraFactors]
    head: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[LoraFactors], LoraFactors]) -> "Adapter":
        """Return the adapter with ``function`` applied to the factors of every module."""
        return Adapter({name: function(f) for name, f in self.modules.items()}, self.head)

    def only(self, trained: Mapping[str, TrainedFactors]) -> "Adapter":
        """Return the adapter with the trained factors of each module, see `LoraFactors.only`."""
        modules = {name: f.only(trained[name]) for name, f in self.modules.items()}
        return Adapter(modules, self.head)

    def filled(self, other: "Adapter") -> "Adapter":
        """Return the adapter with both factors of each module, see `LoraFactors.filled`."""
        modules = {name: f.filled(other.modules[name]) for name, f in self.modules.items()}
        return Adapter(modules, self.head)

    def with_head(self, head: Mapping[str, Tensor]) -> "Adapter":
        """Return the adapter with another head."""
        return Adapter(self.modules, head)

    def fits(self, rank_of: Callable[[str], int]) -> bool:
        """Whether no module has more components than a budget gives it, by its name."""
        return all(factors.rank <= rank_of(name) for name, factors in self.modules.items())

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name: ``head/NAME``, ``lora_A/MODULE`` and ``lora_B/MODULE``."""
        tensors = {f"head/{name}": tensor for name, tensor in self.head.items()}
        for name, factors in self.modules.items():
            tensors[f"lora_A/{name}"] = factors.lora_A
            tensors[f"lora_B/{name}"] = factors.lora_B
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Adapter":
        """Return the adapter whose `tensors` these are."""
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "lora_A": {}, "lora_B": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        modules = {n: LoraFactors(a, parts["lora_B"][n]) for n, a in parts["lora_A"].items()}
        return cls(modules, parts["head"])

    @property
    def num_parameters(self) -> int:
        """Numbers in the factors, head excluded."""
        return sum(f.lora_A.numel() + f.lora_B.numel() for f in self.modules.values())


@dataclass(frozen=True)
class ModuleShape:
    """Size of an adapted layer: ``weight`` has shape ``(out_features, in_features)``."""

    out_features: int
    in_features: int

    @classmethod
    def of(cls, factors: LoraFactors) -> "ModuleShape":
        """Return the shape of the layer that ``factors`` adapts."""
        return cls(factors.out_features, factors.in_features)


def orthogonal_rows(
    rank: int, in_features: int, generator: torch.Generator
) -> Float[Tensor, "rank in_features"]:
    """Return random rows, orthogonal to each other while ``rank <= in_features``.

    Each row has PEFT's expected norm ``1/sqrt(3)``, so that learning rates carry over.

    Parameters
    ----------
    rank
        Rows wanted, at least 1. Above ``in_features`` the rows are orthogonal in blocks.
    in_features
        Width of a row.
    generator
        Source of randomness, on the CPU.
    """
    blocks = []
    for start in range(0, rank, in_features):
        rows = min(in_features, rank - start)
        gaussian = torch.randn(in_features, rows, generator=generator, dtype=torch.float64)
        blocks.append(torch.linalg.qr(gaussian).Q.T)
    return (INITIAL_ROW_NORM * torch.cat(blocks)).float()


def initial_adapter(shapes: Mapping[str, ModuleShape], rank: int, seed: int) -> Adapter:
    """Return an adapter without effect that can learn: B = 0, A random with orthogonal rows.

    Parameters
    ----------
    shapes
        Module name to the size of its layer.
    rank
        Components per module, at least 1.
    seed
        The same seed gives the same adapter, whatever the order of ``shapes``.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in sorted(shapes):
        shape = shapes[name]
        modules[name] = LoraFactors(
            orthogonal_rows(rank, shape.in_features, generator),
            torch.zeros(shape.out_features, rank),
        )
    return Adapter({name: modules[name] for name in shapes})
