"""What a run's summary says of its early end, and of the answers that clients wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hafl_app.dashboard.records import number
from hafl_app.metrics import EXACT_MATCH, ROUGE_L


@dataclass(frozen=True)
class ClientAnswers:
    """Scores of the answers that clients wrote on prompts that they hold out.

    Attributes
    ----------
    who
        ``seen`` or ``unseen``: whether they trained.
    clients, num_examples
        How many clients answered, and how many prompts together.
    scores
        Title of each score, its mean, and that of the clients' worst tenth, as text.
    """

    who: str
    clients: str
    num_examples: str
    scores: tuple[tuple[str, str, str], ...]


def stopped_early(summary: Mapping[str, Any]) -> str:
    """Return in one line that a run ended before its last round; empty if it did not."""
    if not (found := _part(summary, "stopped_early")):
        return ""
    where = f"after round {found.get('round', '?')} of {found.get('of', '?')}"
    return f"stopped early {where}: {found.get('reason') or 'no reason given'}"


def answers_of_clients(summary: Mapping[str, Any]) -> list[ClientAnswers]:
    """Return the scores of clients' answers; empty where none were asked for."""
    parts = _part(summary, "client_generation")
    found = [(who, its) for who in ("seen", "unseen") if (its := _part(parts, who))]
    return [
        ClientAnswers(who, _count(its, "clients"), _count(its, "num_examples"), _scores(its))
        for who, its in found
    ]


def _scores(its: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    worst = _part(its, "worst_tenth")
    return tuple(
        (m.title, m.text(number(its.get(m.name))), m.text(number(worst.get(m.name))))
        for m in (ROUGE_L, EXACT_MATCH)
    )


def _count(its: Mapping[str, Any], name: str) -> str:
    return f"{number(its.get(name)):.0f}".replace("nan", "-")


def _part(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of a summary that a file may lack, or have as anything."""
    found = tree.get(name)
    return found if isinstance(found, dict) else {}
