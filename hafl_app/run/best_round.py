"""The best round of a run: by its score on data that chooses, with its global adapter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hafl_app.lowrank.factors import Adapter
from hafl_app.metrics import Choice
from hafl_app.tracking.base import RoundRecord


@dataclass(frozen=True)
class BestRound:
    """The best round so far: which, chosen on how many rows, and its global adapter."""

    server_round: int
    rows: int
    adapter: Adapter

    def state(self) -> dict[str, int]:
        """Return its part of a checkpoint beside the adapter, as plain values."""
        return {"round": self.server_round, "rows": self.rows}

    def record(self, rounds: Sequence[RoundRecord]) -> RoundRecord:
        """Return its record among those of a run."""
        return next(r for r in rounds if r.server_round == self.server_round)

    def entry(self, rounds: Sequence[RoundRecord], choice: Choice) -> dict[str, Any]:
        """Return its metrics for the summary, named by whose scores chose it.

        ``chosen_by`` names the metric, ``rows`` on how many rows it was measured, and
        ``largest_class`` the share of the largest class in them, null where it is not known.
        """
        entry = {
            "round": self.server_round,
            "chosen_by": choice.metric.name,
            "rows": self.rows,
            "largest_class": choice.largest_share or None,
        }
        return {f"best_{choice.phase}": {**entry, **self.record(rounds).metrics}}


def is_best(
    record: RoundRecord, best: BestRound | None, rounds: Sequence[RoundRecord], choice: Choice
) -> bool:
    """Say whether a round's score is known, and better than that of the best before it.

    Parameters
    ----------
    rounds
        Records of the run, that of the best round among them.
    """
    merit = choice.merit(record.metrics)
    if merit[0] == -math.inf:
        return False
    return best is None or merit > choice.merit(best.record(rounds).metrics)
