"""The diagnosis of a round: how much of its step each client decides.

Under adaptive aggregation a component that two clients train is theirs, however few their examples:
the weight of client k in the adapter's step is ``n_k sum_{i in S_k} 1 / N_i``, with the components
``S_k`` that it trains and the examples ``N_i`` of all who train component i.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.influence import change_factors, influences
from hafl_app.server.update import ClientUpdate

# Numbers that are kept of a vector of a factor while streaming, whatever the model's width.
_PROJECTED = 16
_ROOM = 2**18  # numbers that are allocated at once
_HALF, _FEW = 0.5, 0.2


@dataclass(frozen=True)
class Influence:
    """Influence of one client in a round.

    Parameters
    ----------
    partition_id
        Of the client.
    share
        ``<c_k, D> / ||D||^2`` of the round's step ``D = sum_k c_k``, with ``c_k`` what the client's
        change adds to it in the products ``lora_B lora_A`` of all modules; the shares sum to 1.
    examples
        Its share of the participants' examples, in [0, 1].
    components
        Its share of examples times trained components, in [0, 1]: that of its weight in a mean of
        changes.
    """

    partition_id: int
    share: float
    examples: float
    components: float


@dataclass(frozen=True)
class _Client:
    """What is kept of a client: its weight, its components, and their change by module."""

    partition_id: int
    num_examples: int
    weight: float
    components: Mapping[str, Sequence[int]]
    change: Callable[[str], LoraFactors]

    @property
    def num_components(self) -> int:
        return sum(map(len, self.components.values()))


class InfluenceMeter:
    """The changes of a round, noted while its updates are folded.

    Parameters
    ----------
    coverage_exponent
        ``e`` of a component's divisor ``N_i^(1 - e) N^e``, see `hafl_app.server.method.Traits`.
    projects
        Whether the updates are dropped: then factors are kept that are projected to 16 numbers a
        side, by random signs that are the same for all clients, and a share is an estimate.
    """

    def __init__(self, coverage_exponent: float, *, projects: bool = False) -> None:
        self._exponent, self._projects = coverage_exponent, projects
        self._signs: dict[tuple[int, int], Tensor] = {}
        self._clients: list[_Client] = []
        self._room = torch.empty(0)

    def note(self, update: ClientUpdate, weight: float) -> None:
        """Keep a client's change; ``weight`` is its weight in the method's averages, at least 0."""
        after = update.adapter.modules

        def of_update(name: str) -> LoraFactors:
            return change_factors(update.before_of(name), after[name])

        change: Callable[[str], LoraFactors] = of_update
        if self._projects:
            change = {name: self._projected(of_update(name)) for name in after}.__getitem__
        components = {name: update.components(name) for name in after}
        self._clients.append(
            _Client(update.partition_id, update.num_examples, weight, components, change)
        )

    def result(self) -> tuple[Influence, ...]:
        """Return the influence of each client, in the order noted; empty if nothing has changed."""
        names = list(self._clients[0].components) if self._clients else []
        shares = influences(self._weighted(name) for name in names)
        if not names or not shares.isfinite().all():
            return ()
        examples = [client.num_examples for client in self._clients]
        weights = [client.num_examples * client.num_components for client in self._clients]
        columns = (shares.tolist(), _normalized(examples), _normalized(weights))
        return tuple(
            Influence(client.partition_id, *row)
            for client, *row in zip(self._clients, *columns, strict=True)
        )

    def _weighted(self, name: str) -> list[LoraFactors]:
        """Return the ``c_k`` of a module up to a common factor: each component over its divisor."""
        coverage: defaultdict[int, float] = defaultdict(float)  # N_i
        for client in self._clients:
            for i in client.components[name]:
                coverage[i] += client.weight
        weighted = []
        for client in self._clients:
            divisors = [coverage[i] ** (1 - self._exponent) for i in client.components[name]]
            shares = [client.weight / divisor if divisor else 0.0 for divisor in divisors]
            change = client.change(name)
            columns = change.lora_B.new_tensor(shares * 2)  # see `change_factors`
            weighted.append(LoraFactors(change.lora_A, change.lora_B * columns))
        return weighted

    def _projected(self, factors: LoraFactors) -> LoraFactors:
        left = self._signs_of(factors.out_features, 1).to(factors.lora_B)
        right = self._signs_of(factors.in_features, 0).to(factors.lora_A)
        return LoraFactors(self._kept(factors.lora_A @ right), self._kept(left.T @ factors.lora_B))

    def _kept(self, tensor: Tensor) -> Tensor:
        """Copy a small tensor into a large one: each by itself would keep the memory around it."""
        if len(self._room) < tensor.numel() or self._room.dtype != tensor.dtype:
            size = max(_ROOM, tensor.numel())
            self._room = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
        place, self._room = self._room[: tensor.numel()], self._room[tensor.numel() :]
        return place.view(tensor.shape).copy_(tensor)

    def _signs_of(self, width: int, side: int) -> Tensor:
        """Return random signs ``(width, 16)``: the same for all clients, others for each side."""
        if (width, side) not in self._signs:
            generator = torch.Generator().manual_seed(2 * width + side)
            drawn = torch.randint(2, (width, _PROJECTED), generator=generator)
            self._signs[width, side] = 2.0 * drawn - 1
        return self._signs[width, side]


def _normalized(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 0.0 for value in values]


def deciding(clients: Sequence[Influence]) -> str:
    """Say which few clients decide a round's step; empty if none do.

    Those of the largest influence that make up half of it, if they have less than a fifth of the
    examples.
    """
    few: list[Influence] = []
    for client in sorted(clients, key=lambda one: -one.share):
        few.append(client)
        if (share := sum(one.share for one in few)) >= _HALF:
            break
    else:
        return ""
    examples = sum(one.examples for one in few)
    if examples >= _FEW or len(few) == len(clients):
        return ""
    who = f"{len(few)} {'client' if len(few) == 1 else 'clients'}"
    verb = "makes" if len(few) == 1 else "make"
    return f"{who} with {examples:.1%} of the examples {verb} up {share:.0%} of the step"
