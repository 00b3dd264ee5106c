"""The mean of products of mixed rank, cut to one rank: our way and others."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.timing import DisagreementError, Job, Timing, time_in_turn
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.svd import WeightedStack, truncated_svd

TOLERANCE = 1e-6  # of ||M||_F, against the dense SVD in float64


@dataclass(frozen=True)
class Case:
    """Module with its clients.

    Parameters
    ----------
    size
        Rows and columns of the adapted weight.
    ranks
        Rank of each client; the mean is cut to the largest.
    """

    size: int
    ranks: tuple[int, ...]
    device: str = "cpu"
    updates: Sequence[LoraFactors] = field(default=(), compare=False)

    @property
    def weights(self) -> list[float]:
        """Weight of each client: unequal, adding up to 1."""
        counts = [float(1 + i % 3) for i in range(len(self.ranks))]
        return [count / sum(counts) for count in counts]

    @property
    def name(self) -> str:
        """Size, number of clients and sum of their ranks."""
        return f"{self.size}: {len(self.ranks)} clients, ranks {sum(self.ranks)} in all"


def make_case(size: int, ranks: Sequence[int], device: str = "cpu") -> Case:
    """Draw updates as training leaves them: factors that share directions, of decaying size."""
    generator = torch.Generator().manual_seed(size + sum(ranks))
    longest = max(ranks)
    shared_A = torch.randn(longest, size, generator=generator) / sqrt(size)
    shared_B = torch.randn(size, longest, generator=generator) * torch.logspace(0, -2, longest)
    updates = [
        LoraFactors(
            (shared_A[:rank] + torch.randn(rank, size, generator=generator) / size).to(device),
            (shared_B[:, :rank] * (1 + torch.randn(size, rank, generator=generator))).to(device),
        )
        for rank in ranks
    ]
    return Case(size, tuple(ranks), device, updates)


def ours(case: Case) -> LoraFactors:
    """Compute by the route that `truncated_svd` chooses."""
    return truncated_svd(_stack(case), max(case.ranks))


def plain_qr(case: Case) -> LoraFactors:
    """Compute by QR of both stacked factors and an SVD of the core, in the updates' own dtype."""
    stack = _stack(case)
    Q_B, R_B = torch.linalg.qr(stack.lora_B)
    Q_A, R_A = torch.linalg.qr(stack.lora_A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    rank = max(case.ranks)
    return LoraFactors(Vh[:rank] @ Q_A.T, Q_B @ (U[:, :rank] * S[:rank]))


def dense_svd(case: Case) -> LoraFactors:
    """Decompose the mean as a dense matrix, as FlexLoRA's released code does."""
    mean = _dense_mean(case, torch.float32)
    U, S, Vh = torch.linalg.svd(mean, full_matrices=False)
    rank = max(case.ranks)
    return LoraFactors(Vh[:rank], U[:, :rank] * S[:rank])


def peft_merge(case: Case, full_matrices: bool) -> Callable[[], LoraFactors]:
    """Return PEFT's ``add_weighted_adapter(combination_type="svd")``, with the adapters loaded."""
    names = [f"client{i}" for i in range(len(case.ranks))]
    model = _peft_model(case, names)
    layer: Any = model.base_model.model["module"]

    def merge() -> LoraFactors:
        model.add_weighted_adapter(
            names,
            case.weights,
            "merged",
            combination_type="svd",
            svd_rank=max(case.ranks),
            svd_full_matrices=full_matrices,
        )
        merged = LoraFactors(
            layer.lora_A["merged"].weight.detach().clone(),
            layer.lora_B["merged"].weight.detach() * layer.scaling["merged"],
        )
        model.delete_adapter("merged")
        return merged

    return merge


def _peft_model(case: Case, names: Sequence[str]) -> Any:
    base: Any = nn.ModuleDict({"module": nn.Linear(case.size, case.size, bias=False)})
    configs = [LoraConfig(r=r, lora_alpha=r, target_modules=["module"]) for r in case.ranks]
    model: Any = get_peft_model(base.to(case.device), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layer = model.base_model.model["module"]
    for name, update in zip(names, case.updates, strict=True):
        layer.lora_A[name].weight.data.copy_(update.lora_A)
        layer.lora_B[name].weight.data.copy_(update.lora_B)
    return model


def measure(case: Case, repeats: int, *, slow_peers: bool) -> dict[str, Timing]:
    """Check that every way gives the same matrix, then time them in turn.

    On the CPU with one thread, CPU time is counted, which others on the machine disturb least.

    Parameters
    ----------
    slow_peers
        Also time the dense SVD and PEFT's merge, which take seconds for the large cases.

    Raises
    ------
    DisagreementError
        If a way is off by more than 1e-6 of the norm (1e-4 for those that compute in float32).
    """
    ways: dict[str, Callable[[], LoraFactors]] = {
        "ours": lambda: ours(case),
        "plain QR": lambda: plain_qr(case),
    }
    if slow_peers:
        ways["dense SVD"] = lambda: dense_svd(case)
        ways["PEFT merge"] = peft_merge(case, full_matrices=True)
        ways["PEFT merge, thin"] = peft_merge(case, full_matrices=False)
    _check_agreement(case, ways, slow_peers=slow_peers)
    on_cpu = case.device == "cpu"
    jobs = ways if on_cpu else {name: _synchronized(way) for name, way in ways.items()}
    return time_in_turn(jobs, repeats, clock=time.process_time if on_cpu else time.perf_counter)


def _synchronized(job: Job) -> Job:
    def run() -> None:
        job()
        torch.cuda.synchronize()

    return run


def _check_agreement(
    case: Case, ways: dict[str, Callable[[], LoraFactors]], *, slow_peers: bool
) -> None:
    mean = _dense_mean(case, torch.float64)
    norm = torch.linalg.matrix_norm(mean)
    # The error of the best approximation is unique, which its factors are not.
    spectrum = torch.linalg.svdvals(mean) if slow_peers else _spectrum(case)
    least = spectrum[max(case.ranks) :].norm()
    for name, way in ways.items():
        error = torch.linalg.matrix_norm(mean - _product(way()))
        allowed = TOLERANCE if name == "ours" else 1e-4
        if not abs(error - least) < allowed * norm:
            raise DisagreementError(
                f"{case.name}: {name} leaves an error of {error:.3g}, the least is {least:.3g} "
                f"(norm {norm:.3g})"
            )


def _spectrum(case: Case) -> Tensor:
    """Return all singular values from the factors, in float64: dense ones take minutes."""
    stack = _stack(case)
    R_B = torch.linalg.qr(stack.lora_B.double(), mode="r").R
    R_A = torch.linalg.qr(stack.lora_A.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(R_B @ R_A.T)
    return values


def _product(factors: LoraFactors) -> Tensor:
    return factors.lora_B.double() @ factors.lora_A.double()


def _dense_mean(case: Case, dtype: torch.dtype) -> Tensor:
    mean = torch.zeros(case.size, case.size, dtype=dtype, device=case.device)
    for update, weight in zip(case.updates, case.weights, strict=True):
        mean.addmm_(update.lora_B.to(dtype), update.lora_A.to(dtype), alpha=weight)
    return mean


def _stack(case: Case) -> LoraFactors:
    stack = WeightedStack()
    for update, weight in zip(case.updates, case.weights, strict=True):
        stack = stack.append(update, weight)
    return stack.factors()
