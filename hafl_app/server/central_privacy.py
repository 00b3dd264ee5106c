"""Central differential privacy: the server's step when clients of mixed rank are clipped.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018,
arXiv:1710.06963, with the estimator of fixed denominators, component by component.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.privacy.mechanism import (
    NoiseSource,
    PrivacyError,
    PrivacyOptions,
    add_noise,
    clipped_change,
)
from hafl_app.server.method import Division
from hafl_app.server.update import ClientUpdate


def trainable_counts(plans: Iterable[TrainPlan], adapter: Adapter) -> dict[str, Tensor]:
    """Count for each component how many of these plans train its lora_A, and how many its lora_B.

    Parameters
    ----------
    plans
        Of every registered node, whether drawn in this round or not.
    adapter
        The global adapter.

    Returns
    -------
    dict
        Module name to counts of lora_A and of lora_B, shape ``(2, rank)``, float64.
    """
    counts = {
        name: torch.zeros(2, factors.rank, dtype=torch.float64)
        for name, factors in adapter.modules.items()
    }
    for plan in plans:
        for name, of_module in counts.items():
            module = plan.modules[name]
            trained = torch.tensor(
                [module.uploads != "B", module.uploads != "A"], dtype=torch.float64
            )
            of_module[:, list(module.trainable[: module.num_uploaded])] += trained[:, None]
    return counts


def next_adapter(
    previous: Adapter,
    updates: Iterable[ClientUpdate],
    trainable_counts: Mapping[str, Tensor],
    num_nodes: int,
    sampling_rate: float,
    options: PrivacyOptions,
    noise: NoiseSource,
    server_round: int,
    division: Division,
) -> Adapter:
    """Return the next global adapter from clipped changes and noise.

    With ``s_i = sum_k clip(change_k)_i + N(0, (z C)^2)`` over the round's updates, each client
    counting 1, ``n_i`` nodes whose plan trains this factor of component i, N nodes in all and
    sampling rate q:

    - ``contributors``: ``previous_i + s_i / (q n_i)``
    - ``participants``: ``previous_i n_i / N + s_i / (q N)``, zero padding in expectation
    - head: ``previous + s / (q N)``

    The denominators are expected values, not the counts that came: the sum then changes by at
    most C with one client, and nothing else does. What no node trains, a component or a factor of
    it, keeps its value and gets no noise, also lora_B under ``participants``, where plain zero
    padding clears it. No updates still make a release, of noise alone.

    Parameters
    ----------
    previous
        The global adapter; its head only if all clients train it and it travels.
    updates
        Replies that count; any number, in partition order.
    trainable_counts
        ``n_i``, see `trainable_counts`.
    num_nodes
        ``N``, at least 1.
    sampling_rate
        ``q`` in (0, 1], each node's chance to be drawn by
        `hafl_app.server.client_sampling.sample_poisson`.
    division
        Divisor of the method, from `hafl_app.server.compatibility.private_division`.

    Raises
    ------
    PrivacyError
        If an update does not fit the previous adapter, or trains what no plan trains.
    """
    planned = (_checked(update, trainable_counts) for update in updates)
    total = sum_of_changes(previous, planned, options.clip_norm)
    noisy = add_noise(
        total, options.noise_std, noise.generator(server_round, "sum of changes", total)
    )
    modules = {
        name: _next_factors(
            factors, noisy.modules[name], trainable_counts[name], num_nodes, sampling_rate, division
        )
        for name, factors in previous.modules.items()
    }
    head = {
        name: (tensor.double() + noisy.head[name] / (sampling_rate * num_nodes)).to(tensor.dtype)
        for name, tensor in previous.head.items()
    }
    return Adapter(modules, head)


def sum_of_changes(previous: Adapter, updates: Iterable[ClientUpdate], clip_norm: float) -> Adapter:
    """Return ``sum_k clip(change_k)``, each component in its slot, in float64.

    One client more or less changes it by at most ``clip_norm`` in L2 norm.
    """
    sums = {name: ComponentSums.zeros(factors) for name, factors in previous.modules.items()}
    head = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in previous.head.items()}
    for update in updates:
        change = clipped_change(update.adapter, update.before, clip_norm)
        if set(change.head) != set(head) or set(change.modules) != set(sums):
            odd = sorted({*change.head} ^ {*head} | {*change.modules} ^ {*sums})[0]
            raise PrivacyError(
                f"partition {update.partition_id}: {odd} is in the update or in the global "
                "adapter, expected in both"
            )
        sums = {
            name: s.add(change.modules[name], update.components(name), 1.0)
            for name, s in sums.items()
        }
        head = {name: tensor + change.head[name] for name, tensor in head.items()}
    return Adapter({name: LoraFactors(s.lora_A, s.lora_B) for name, s in sums.items()}, head)


def _next_factors(
    previous: LoraFactors,
    noisy: LoraFactors,
    counts: Tensor,
    num_nodes: int,
    sampling_rate: float,
    division: Division,
) -> LoraFactors:
    if division == "contributors":
        kept, divisor = torch.ones_like(counts), sampling_rate * counts.clamp(min=1)
    else:
        kept = counts / num_nodes
        divisor = torch.full_like(counts, sampling_rate * num_nodes)
    lora_A = previous.lora_A * kept[0, :, None] + noisy.lora_A / divisor[0, :, None]
    lora_B = previous.lora_B * kept[1] + noisy.lora_B / divisor[1]
    trains_A, trains_B = counts > 0
    return LoraFactors(
        lora_A.to(previous.lora_A.dtype).where(trains_A[:, None], previous.lora_A),
        lora_B.to(previous.lora_B.dtype).where(trains_B, previous.lora_B),
    )


def _checked(update: ClientUpdate, counts: Mapping[str, Tensor]) -> ClientUpdate:
    """Return an update; refuse one with components that no registered node's plan trains."""
    for name, n in counts.items():
        module = update.plan.modules[name]
        trained = torch.tensor([module.uploads != "B", module.uploads != "A"])
        odd = [i for i in update.components(name) if (n[trained, i] == 0).any()]
        if odd:
            raise PrivacyError(
                f"partition {update.partition_id}, {name}: component {odd[0]} was trained, "
                "but no registered node's plan trains it"
            )
    return update
