"""The ledger: bytes and rejected replies of every exchange, by round, phase and rank."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

_OF_A_ROUND = ("train", "evaluate", "head")  # phases


@dataclass(frozen=True)
class Traffic:
    """Sums over exchanges: bytes, of which the heads', and how many of them did not count."""

    exchanges: int = 0
    refused: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    head_bytes_down: int = 0
    head_bytes_up: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Return the sums of both."""
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Traffic)))


class Ledger:
    """All exchanges of a run, failed ones included; it grows with rounds, not with clients."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str, int], Traffic] = {}

    def add(self, server_round: int, phase: str, rank: int, traffic: Traffic) -> None:
        """Enter an exchange.

        Parameters
        ----------
        phase
            ``train``, ``evaluate``, ``head``, ``alone``, ``unseen`` or ``generate``.
        rank
            The node's budget.
        """
        key = (server_round, phase, rank)
        self._sums[key] = self._sums.get(key, Traffic()) + traffic

    def of_round(self, server_round: int, phases: Iterable[str] = _OF_A_ROUND) -> Traffic:
        """Return the sums of one round."""
        chosen = [t for (r, p, _), t in self._sums.items() if r == server_round and p in phases]
        return sum(chosen, start=Traffic())

    def of_phase(self, phase: str) -> Traffic:
        """Return the sums of one phase over all rounds."""
        return sum(self.by_rank(phase).values(), start=Traffic())

    def by_rank(self, phase: str) -> dict[int, Traffic]:
        """Return the sums of one phase by rank, in ascending order."""
        table: dict[int, Traffic] = {}
        for (_, p, rank), traffic in sorted(self._sums.items()):
            if p == phase:
                table[rank] = table.get(rank, Traffic()) + traffic
        return dict(sorted(table.items()))

    def to_json(self) -> list[dict[str, Any]]:
        """Return all sums as plain values."""
        return [
            {"server_round": r, "phase": p, "rank": k, **asdict(t)}
            for (r, p, k), t in self._sums.items()
        ]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> "Ledger":
        """Read what `to_json` wrote."""
        ledger = cls()
        for row in rows:
            values = dict(row)
            key = values.pop("server_round"), values.pop("phase"), values.pop("rank")
            ledger.add(*key, Traffic(**values))
        return ledger
