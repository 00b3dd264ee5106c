"""Answers that clients write on their own held-out prompts: asked for once, scored where they are.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources" (FlexLoRA), NeurIPS 2024, arXiv:2402.11505, report Rouge-L on unseen clients. Differs
from the paper, where the server holds those clients' tasks: here the answers never leave a client.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from hafl_app.metrics import EXACT_MATCH, ROUGE_L, weighted_mean, worst_tenth
from hafl_app.server.coordinator import Strategy
from hafl_app.server.final_exchange import final_exchange
from hafl_app.server.reply_validation import ReplyError
from hafl_app.server.round_messages import STATED_EXAMPLES
from hafl_app.wire.message_types import EVALUATE_ANSWERS
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import NUM_EXAMPLES

PHASE = "generate"
"""Under which the traffic is entered in the ledger."""

_METRICS = (ROUGE_L, EXACT_MATCH)
_MOST_BYTES = 64 * 1024  # of a reply, which is a few numbers


def answers_of_clients(strategy: Strategy, grid: Grid, server_round: int) -> dict[str, Any]:
    """Let clients answer prompts with what the method would send them; return their scores.

    Parameters
    ----------
    strategy
        After its last round; nothing of it changes but the ledger.

    Returns
    -------
    dict
        ``seen`` and ``unseen`` clients, as far as any answered: means by number of answers, the
        mean of the worst tenth of the clients, ``clients`` and ``num_examples``, and each client's
        scores as ``by_client``. Empty where none are asked.
    """
    if not strategy.options.federation.generate_on_clients:
        return {}
    participation = strategy.coordinator.participation
    unseen = participation.held_out_present(grid)
    profiles = [*participation.select_for_evaluation(server_round, grid), *unseen]
    profiles.sort(key=lambda profile: profile.partition_id)
    scores = _ask(strategy, grid, profiles, server_round)
    held_out = participation.held_out
    parts = {
        "seen": [(p, its) for p, its in scores if p.partition_id not in held_out],
        "unseen": [(p, its) for p, its in scores if p.partition_id in held_out],
    }
    return {who: _summed(part) for who, part in parts.items() if part}


def _ask(
    strategy: Strategy, grid: Grid, profiles: Sequence[NodeProfile], server_round: int
) -> list[tuple[NodeProfile, Mapping[str, float]]]:
    most = strategy.options.federation.generate_on_clients

    def read(_: Message, metrics: Mapping[str, float]) -> Mapping[str, float]:
        missing = [metric.name for metric in _METRICS if metric.name not in metrics]
        if missing:
            raise ReplyError(f"no {' and no '.join(missing)} of the answers")
        if metrics[STATED_EXAMPLES] > most:
            raise ReplyError(
                f"{NUM_EXAMPLES} is {metrics[STATED_EXAMPLES]:.0f}, expected at most {most} answers"
            )
        return metrics

    exchange, replies = final_exchange(
        strategy, grid, profiles, server_round, PHASE, EVALUATE_ANSWERS
    )
    found = [
        (reply.profile, metrics)
        for reply, metrics in exchange.validate_by(replies, read, _MOST_BYTES, in_order=False)
        if metrics is not None
    ]
    exchange.close([])
    return found


def _summed(scores: Sequence[tuple[NodeProfile, Mapping[str, float]]]) -> dict[str, Any]:
    metrics = [its for _, its in scores]
    return {
        **{m.name: weighted_mean(metrics, m.name, STATED_EXAMPLES) for m in _METRICS},
        "worst_tenth": {m.name: worst_tenth([its[m.name] for its in metrics], m) for m in _METRICS},
        "clients": len(scores),
        "num_examples": sum(int(its[STATED_EXAMPLES]) for its in metrics),
        "by_client": [
            {
                "partition_id": profile.partition_id,
                "rank": profile.rank,
                **{m.name: its[m.name] for m in _METRICS},
                "num_examples": int(its[STATED_EXAMPLES]),
                "left_out": int(its.get("left-out", 0)),
                "unanswered": int(its.get("unanswered", 0)),
            }
            for profile, its in scores
        ],
    }
