"""Nodes whose replies keep being rejected rest for some rounds."""

from collections.abc import Mapping
from typing import Any


class Quarantine:
    """Nodes that are not selected for some rounds, since their replies were rejected.

    After ``after`` rejected replies in a row a node is out for ``rounds`` rounds. Then it is
    asked again, and one more rejection puts it out at once for as long; a reply that counts clears
    its record.

    Parameters
    ----------
    after
        Rejected replies in a row, at least 0; 0 leaves none out.
    rounds
        Length of a rest, at least 1.
    """

    def __init__(self, after: int, rounds: int) -> None:
        self._after = after
        self._rounds = rounds
        self._rejected_in_row: dict[int, int] = {}
        self._last_round_out: dict[int, int] = {}

    def record(self, node_id: int, ok: bool, server_round: int) -> None:
        """Record whether a node's reply in this round was accepted."""
        if ok:
            self._rejected_in_row.pop(node_id, None)
            self._last_round_out.pop(node_id, None)
            return
        rejected = self._rejected_in_row.get(node_id, 0) + 1
        self._rejected_in_row[node_id] = rejected
        if 0 < self._after <= rejected:
            self._last_round_out[node_id] = server_round + self._rounds

    def excluded(self, server_round: int) -> set[int]:
        """Return the nodes that are left out of this round."""
        return {p for p, last in self._last_round_out.items() if server_round <= last}

    def renamed(self, names: Mapping[int, int]) -> "Quarantine":
        """Return the same quarantine under other ids; a node without one is dropped."""
        other = Quarantine(self._after, self._rounds)
        for mine, theirs in (
            (self._rejected_in_row, other._rejected_in_row),
            (self._last_round_out, other._last_round_out),
        ):
            theirs.update({names[k]: value for k, value in mine.items() if k in names})
        return other

    def to_json(self) -> dict[str, Any]:
        """Return the state for `from_json`; JSON has no numbers as keys.

        Flower's node ids may be others when a run goes on: see `renamed`.
        """
        return {
            "refused-in-row": [list(pair) for pair in sorted(self._rejected_in_row.items())],
            "last-round-out": [list(pair) for pair in sorted(self._last_round_out.items())],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], after: int, rounds: int) -> "Quarantine":
        """Return the quarantine that `to_json` described, under these settings.

        A rest that has begun keeps its end when ``rounds`` has changed.
        """
        quarantine = cls(after, rounds)
        quarantine._rejected_in_row = _numbers(values["refused-in-row"])
        quarantine._last_round_out = _numbers(values["last-round-out"])
        return quarantine


def _numbers(pairs: Any) -> dict[int, int]:
    return {int(node_id): int(number) for node_id, number in pairs}
