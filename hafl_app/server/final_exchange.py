"""An exchange after the last round: clients get what the method would send them next."""

from collections.abc import Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from hafl_app.server.coordinator import Strategy
from hafl_app.server.replies import all_replies
from hafl_app.server.round_messages import RoundMessages
from hafl_app.wire.node_profile import NodeProfile


def final_exchange(
    strategy: Strategy,
    grid: Grid,
    profiles: Sequence[NodeProfile],
    server_round: int,
    phase: str,
    message_type: str,
) -> tuple[RoundMessages, list[Message]]:
    """Ask clients once, each with its own plan, and return what comes in time.

    Parameters
    ----------
    strategy
        After its last round; nothing of it changes but the ledger.
    phase
        Under which the traffic is entered in the ledger, and stage of the run's progress.

    Returns
    -------
    tuple
        The messages, which validate the replies and are closed by the caller, and the replies.
    """
    coordinator = strategy.coordinator
    coordinator.watch.begin(phase, server_round + 1)
    plans = [strategy.plan(profile, server_round) for profile in profiles]
    exchange = coordinator.messages(server_round, phase)
    messages = exchange.messages(profiles, plans, strategy.dispatch, message_type)
    timeout_s = strategy.options.federation.round_timeout_s
    return exchange, all_replies(grid, messages, timeout_s, watch=coordinator.watch)
