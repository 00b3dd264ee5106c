"""The ledger: bytes of every message, by round, phase and partition."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Bytes of one exchange with one node: the request down, the reply up; heads counted apart.

    `phase` is ``train``, ``evaluate`` or ``alone``.
    """

    server_round: int
    phase: str
    partition_id: int
    rank: int
    bytes_down: int
    bytes_up: int
    head_bytes_down: int
    head_bytes_up: int


class Ledger:
    """All exchanges of a run, failed ones included."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, entry: Entry) -> None:
        """Record an exchange."""
        self.entries.append(entry)

    def of_round(
        self, server_round: int, phases: Iterable[str] = ("train", "evaluate")
    ) -> "Ledger":
        """Return the entries of one round."""
        selected = Ledger()
        selected.entries = [
            e for e in self.entries if e.server_round == server_round and e.phase in phases
        ]
        return selected

    def of_phase(self, phase: str) -> "Ledger":
        """Return the entries of one phase."""
        selected = Ledger()
        selected.entries = [e for e in self.entries if e.phase == phase]
        return selected

    @property
    def bytes_down(self) -> int:
        """Bytes sent to nodes."""
        return sum(entry.bytes_down for entry in self.entries)

    @property
    def bytes_up(self) -> int:
        """Bytes received from nodes."""
        return sum(entry.bytes_up for entry in self.entries)

    def by_rank(self) -> dict[str, dict[str, int]]:
        """Return total bytes down and up of each rank, and of them the head's."""
        table: dict[str, dict[str, int]] = {}
        for entry in sorted(self.entries, key=lambda e: e.rank):
            row = table.setdefault(
                str(entry.rank),
                {"bytes_down": 0, "bytes_up": 0, "head_bytes_down": 0, "head_bytes_up": 0},
            )
            for key in row:
                row[key] += getattr(entry, key)
        return table
