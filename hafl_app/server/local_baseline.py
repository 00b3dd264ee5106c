"""Local-only training: what a device reaches by itself, the baseline of every federation."""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import MessageType
from flwr.serverapp import Grid

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.server.coordinator import Strategy
from hafl_app.server.replies import all_replies
from hafl_app.wire.node_profile import NodeProfile


@dataclass(frozen=True)
class AloneResult:
    """The adapter that one client trained alone, and whether at its own rank or at another."""

    profile: NodeProfile
    adapter: Adapter
    at_own_rank: bool = True


def train_alone(
    strategy: Strategy,
    grid: Grid,
    initial: Adapter,
    profiles: Sequence[NodeProfile],
    num_rounds: int,
    rank: int | None = None,
) -> list[AloneResult]:
    """Train each of these clients by itself, from the initial adapter cut to its rank.

    A client passes over its data as often, and at the same learning rates, as it would in a
    federation that it never misses. Clients whose reply does not count are left out.

    Parameters
    ----------
    strategy
        A finished federation's; its global adapter does not change.
    initial
        The adapter and head that the federation started from.
    profiles
        Clients to train.
    num_rounds
        Rounds that the federation had, at least 1.
    rank
        Of all of them; None is each client's own. At most the initial adapter's.
    """
    options = strategy.options
    plans = [
        strategy.prefix_plan(
            strategy.budgets(profile) if rank is None else rank,
            head="frozen" if options.head == "frozen" else "averaged",
            local_epochs=num_rounds * options.client.local_epochs,
            max_steps=num_rounds * options.client.max_steps,
            rates=options.rates_until(num_rounds),
            proximal=0.0,  # there are no others to drift away from
            logit_adjustment=None,  # nor any who have the other classes
            # Alone, a device uploads nothing; here it does so only to be scored.
            upload="fp32",
            error_feedback=False,
        )
        for profile in profiles
    ]

    def dispatch(plan: TrainPlan) -> Adapter:
        modules = {n: f.select(plan.modules[n].held) for n, f in initial.modules.items()}
        return Adapter(modules, initial.head if plan.sends_head else {})

    after = num_rounds + 1
    exchange = strategy.coordinator.messages(after, "alone")
    messages = exchange.messages(profiles, plans, dispatch, MessageType.TRAIN)
    # A run of many rounds at once may take that many times as long.
    timeout_s = options.federation.round_timeout_s * num_rounds
    seconds = strategy.coordinator.participation.seconds
    watch = strategy.coordinator.watch
    watch.begin("alone", after)
    replies = all_replies(grid, messages, timeout_s, seconds, watch=watch)
    validated = exchange.validate_training(replies)
    exchange.close(validated)
    return [
        AloneResult(
            reply.profile,
            reply.update.adapter.with_head(reply.update.adapter.head or initial.head),
            at_own_rank=rank is None,
        )
        for reply in validated
        if reply.update is not None
    ]
