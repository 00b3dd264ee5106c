"""Clients that never train: how well the global adapter serves those who did not shape it.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources" (FlexLoRA), NeurIPS 2024, arXiv:2402.11505, score unseen clients so. Differs from the
paper, which has the server score the global adapter on the tasks of held-out clients: here each
of them scores what the method would send it, at its own rank, on its held-out rows.
"""

from typing import Any

from flwr.app import MessageType
from flwr.serverapp import Grid

from hafl_app.seeds import sample_positions
from hafl_app.server.coordinator import Strategy
from hafl_app.server.final_exchange import final_exchange
from hafl_app.wire.records import NUM_EXAMPLES

PHASE = "unseen"
"""Under which their traffic is entered in the ledger."""


def draw_unseen(num_clients: int, unseen_clients: int, seed: int) -> frozenset[int]:
    """Return the partitions that never train: drawn by the seed alone, so for every method.

    Parameters
    ----------
    num_clients
        Partitions there are.
    unseen_clients
        Number to draw, in [0, num_clients].
    """
    return frozenset(sample_positions(num_clients, unseen_clients, seed, "unseen"))


def evaluate_unseen(strategy: Strategy, grid: Grid, server_round: int) -> dict[str, Any]:
    """Evaluate the adapter on unseen clients, each at its own rank.

    Parameters
    ----------
    strategy
        After its last round; nothing of it changes but the ledger.

    Returns
    -------
    dict
        ``partitions`` whose replies count, and the task's metrics, means by number of examples.
        Empty where there are no unseen clients, or none answers.
    """
    participation = strategy.coordinator.participation
    if not participation.held_out:
        return {}
    profiles = participation.held_out_present(grid)
    exchange, replies = final_exchange(
        strategy, grid, profiles, server_round, PHASE, MessageType.EVALUATE
    )
    validated = exchange.validate_scores(replies)
    exchange.close(validated)
    counted = [reply for reply in validated if not reply.error]
    if not counted:
        return {}
    partitions = [reply.profile.partition_id for reply in counted]
    metrics = strategy.coordinator.task.of_clients(
        [reply.metrics for reply in counted], NUM_EXAMPLES
    )
    return {"partitions": partitions, **metrics}
