"""Drive a strategy without Flower: plan, dispatch, a client's reply, the fold."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hafl_app.config.compose import compose
from hafl_app.config.files import CONF
from hafl_app.lowrank.cores import frozen_bases, with_cores
from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape, initial_adapter
from hafl_app.run import build
from hafl_app.server.aggregation import merge as merge_into
from hafl_app.server.method import StrategyError
from hafl_app.server.options import RunOptions
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.strategies.core_mean import CoreMean
from hafl_app.training.choosing import chosen_plan
from hafl_app.wire.node_profile import NodeProfile

STRATEGIES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
MAX_RANK = 4
BASE_RANK = 2  # of what a method has merged into the base before the test starts
# Never square, and modules that differ: a transposed or swapped factor must fail.
SHAPES = {"query": ModuleShape(7, 5), "dense": ModuleShape(6, 9)}
HEAD = {"weight": (3, 7), "bias": (3,)}
ROOMS = ("federation", "client", "lora")

Change = Callable[[LoraFactors, torch.Generator], LoraFactors]


def strategy_named(name: str, *overrides: str) -> HeterogeneousLora:
    """Return the strategy of a file in conf/strategy, small, with a global adapter that works.

    A method that changes the base is in the middle of a run: it has changed it.
    """
    settings = compose([f"strategy={name}", f"lora.max_rank={MAX_RANK}", *overrides])
    strategy = build.strategy(settings)
    strategy.options = run_options(seed=3, num_rounds=5)
    generator = torch.Generator().manual_seed(11)
    start = initial_adapter(SHAPES, MAX_RANK + BASE_RANK * strategy.traits.changes_base, seed=1)
    strategy.global_adapter = Adapter(
        {
            n: LoraFactors(f.lora_A, torch.randn(f.lora_B.shape, generator=generator))
            for n, f in start.modules.items()
        },
        {n: torch.randn(shape, generator=generator) for n, shape in HEAD.items()},
    )
    if isinstance(strategy, CoreMean):
        set_modules(strategy, made_of_cores(strategy, generator))
    return strategy


def made_of_cores(strategy: CoreMean, generator: torch.Generator) -> dict[str, LoraFactors]:
    """Return an adapter that random cores make, of clients of the largest rank or of a lower one.

    Upper triangular ones: the first components are then what a smaller core makes of fewer.
    """
    plan = strategy.plan(Client(strategy.max_rank, 1, 0).profile, 1)
    modules = {}
    for name, bases in strategy.bases().items():
        size = plan.modules[name].core.size
        cores = [
            torch.randn(size, size, generator=generator).triu()
            for _ in plan.modules[name].held[::size]
        ]
        modules[name] = with_cores(LoraFactors(bases.lora_A[:, :0], torch.cat(cores, 1)), bases)
    return modules


def whole(
    update: ClientUpdate, name: str, factors: LoraFactors, held: Sequence[int]
) -> LoraFactors:
    """Return the factors of components that came as cores, if they did."""
    core = update.plan.modules[name].core
    if core is None:
        return factors
    return with_cores(factors, frozen_bases(SHAPES, core.rank, core.seed)[name].select(held))


def serves_mixed_ranks(name: str) -> bool:
    try:
        strategy_named(name).check([1, MAX_RANK])
    except StrategyError:
        return False
    return True


@dataclass(frozen=True)
class Client:
    """A client to be: what it may train, how much it counts, and what training does to it."""

    rank: int
    num_examples: int
    partition_id: int
    noise_seed: int | None = None

    @property
    def profile(self) -> NodeProfile:
        return NodeProfile(self.partition_id, 99, self.rank, self.num_examples, "cpu")


def clients_for(name: str) -> list[Client]:
    """Return four clients, of mixed ranks where the method serves them."""
    ranks = (1, 2, 4, 3) if serves_mixed_ranks(name) else (3, 3, 3, 3)
    return [
        Client(rank, examples, partition_id)
        for partition_id, (rank, examples) in enumerate(zip(ranks, (10, 25, 7, 31), strict=True))
    ]


def nothing(factors: LoraFactors, generator: torch.Generator) -> LoraFactors:
    del generator
    return factors


def noise(factors: LoraFactors, generator: torch.Generator) -> LoraFactors:
    return LoraFactors(
        factors.lora_A + 0.3 * torch.randn(factors.lora_A.shape, generator=generator),
        factors.lora_B + 0.3 * torch.randn(factors.lora_B.shape, generator=generator),
    )


def update_of(
    strategy: HeterogeneousLora, client: Client, change: Change, server_round: int = 1
) -> ClientUpdate:
    """Execute the plan as a client: the factors it trains change, and come back."""
    plan = strategy.plan(client.profile, server_round)
    sent = strategy.dispatch(plan)
    seed = client.partition_id if client.noise_seed is None else client.noise_seed
    # What a client chooses where its plan lets it: by scores that are as good as any.
    generator = torch.Generator().manual_seed(seed)
    plan = chosen_plan(
        plan,
        {n: torch.rand(len(m.trainable), generator=generator) for n, m in plan.modules.items()},
        seed,
    )
    modules = {}
    for name, factors in sent.modules.items():
        # The same noise for the same module whatever the order of modules.
        generator = torch.Generator().manual_seed(seed * 1000 + zlib.crc32(name.encode()) % 997)
        before = factors.select(plan.modules[name].trainable_slots)
        after = change(before, generator).only(plan.modules[name].uploads)
        if plan.modules[name].own_lora_B:
            # It never comes; the laws look at lora_A beside the lora_B that the server has.
            before = strategy.global_adapter.modules[name].select(plan.modules[name].trainable)
        modules[name] = after.filled(before)
    scores = {n: torch.rand(len(plan.modules[n].trainable)) for n in modules}
    return ClientUpdate(
        client.partition_id,
        client.num_examples,
        plan,
        sent,
        Adapter(modules, sent.head),
        scores if plan.importance != "none" else {},
    )


def model_after(update: ClientUpdate) -> dict[str, LoraFactors]:
    """Return all that a client's model has after training: what it trained, and what it held."""
    return {
        name: _held(update, name).replace(
            update.plan.modules[name].trainable_slots,
            whole(update, name, update.adapter.modules[name], update.components(name)),
        )
        for name in update.sent.modules
    }


def _held(update: ClientUpdate, name: str) -> LoraFactors:
    """Return what a client held; a lora_B of its own was not sent."""
    sent, trained = update.sent.modules[name], update.adapter.modules[name]
    if update.plan.modules[name].core is not None:
        return whole(update, name, sent, update.plan.modules[name].held)
    return sent.filled(LoraFactors(sent.lora_A, torch.zeros(trained.out_features, sent.rank)))


def merge(strategy: HeterogeneousLora, updates: Sequence[ClientUpdate]) -> dict[str, LoraFactors]:
    """Merge the updates and return the next factors; the strategy's own adapter stays."""
    return dict(merge_into(strategy, strategy.global_adapter, updates).modules)


def with_unchosen(strategy: HeterogeneousLora, update: ClientUpdate) -> ClientUpdate:
    """Return an update with all that its client could have chosen, the rest as it was sent."""
    if update.plan.choice is None:
        return update
    everything = update.sent.modules
    modules = {
        n: replace(m, trainable=tuple(range(everything[n].rank)))
        for n, m in update.plan.modules.items()
    }
    plan = replace(update.plan, modules=modules)
    before = {n: f.select(plan.modules[n].trainable_slots) for n, f in update.sent.modules.items()}
    modules = {
        n: before[n].replace(map(plan.modules[n].trainable.index, update.components(n)), factors)
        for n, factors in update.adapter.modules.items()
    }
    return replace(update, plan=plan, adapter=Adapter(modules, update.adapter.head))


def means_over_trainers(
    strategy: HeterogeneousLora, updates: Sequence[ClientUpdate]
) -> list[ClientUpdate]:
    """Return the updates, each component as its mean over those who trained it, heads as theirs.

    What a secure sum tells of them, weighted as the method says before training.
    """
    updates = [with_unchosen(strategy, update) for update in updates]
    weights = [strategy.planned_weight(u.plan, u.num_examples) for u in updates]
    total = sum(u.num_examples for u in updates)
    head = {
        name: sum(u.num_examples * u.adapter.head[name] for u in updates) / total
        for name in updates[0].adapter.head
    }
    return [
        replace(
            u,
            adapter=Adapter({n: _means(n, u, updates, weights) for n in u.adapter.modules}, head),
        )
        for u in updates
    ]


def _means(
    name: str, one: ClientUpdate, updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> LoraFactors:
    means = []
    for component in one.components(name):
        parts = [
            (w, u.adapter.modules[name].select([u.components(name).index(component)]))
            for u, w in zip(updates, weights, strict=True)
            if component in u.components(name)
        ]
        total = sum(w for w, _ in parts)
        lora_A = sum(w / total * part.lora_A.double() for w, part in parts)
        lora_B = sum(w / total * part.lora_B.double() for w, part in parts)
        means.append(LoraFactors(lora_A.float(), lora_B.float()))
    if not means:
        return one.adapter.modules[name]
    return LoraFactors(
        torch.cat([mean.lora_A for mean in means]), torch.cat([mean.lora_B for mean in means], 1)
    )


def advance(strategy: HeterogeneousLora, updates: Sequence[ClientUpdate]) -> None:
    """Merge the updates into the strategy's own adapter."""
    set_modules(strategy, merge(strategy, updates))


def set_modules(strategy: HeterogeneousLora, modules: Mapping[str, LoraFactors]) -> None:
    """Replace the factors of the global adapter."""
    strategy.global_adapter = Adapter(modules, strategy.global_adapter.head)


def at_start(strategy: HeterogeneousLora) -> HeterogeneousLora:
    """Return the strategy as it is before round 1: lora_B is 0, the base as it was."""
    set_modules(strategy, initial_adapter(SHAPES, MAX_RANK, seed=1).modules)
    return strategy


def dense(factors: LoraFactors) -> NDArray[np.float64]:
    """Return the product, for oracles that are written in numpy."""
    product: NDArray[np.float64] = factors.lora_B.double().numpy() @ factors.lora_A.double().numpy()
    return product


def run_options(options: RunOptions | None = None, **changes: Any) -> RunOptions:
    """Return options with some settings changed, each in the room that it is of."""
    options = options or RunOptions()
    for name, value in changes.items():
        room = next((r for r in ROOMS if hasattr(getattr(options, r), name)), None)
        if room is None:
            options = replace(options, **{name: value})
        else:
            changed = replace(getattr(options, room), **{name: value})
            options = replace(options, **{room: changed})
    return options


def scaled_examples(updates: Sequence[ClientUpdate], factor: int) -> list[ClientUpdate]:
    return [replace(u, num_examples=u.num_examples * factor) for u in updates]
