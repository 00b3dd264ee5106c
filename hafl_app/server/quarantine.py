"""Nodes whose replies keep being refused rest for some rounds."""

from collections.abc import Mapping
from typing import Any


class Quarantine:
    """Who is left out of a round, from whose replies counted and whose did not.

    After ``after`` refused replies in a row a partition is out for ``rounds`` rounds. Then it is
    asked again, and one more refusal puts it out at once for as long; a reply that counts clears
    its record.

    Parameters
    ----------
    after
        Refused replies in a row, at least 0; 0 leaves nobody out.
    rounds
        Length of a rest, at least 1.
    """

    def __init__(self, after: int, rounds: int) -> None:
        self._after = after
        self._rounds = rounds
        self._refused_in_row: dict[int, int] = {}
        self._last_round_out: dict[int, int] = {}

    def record(self, partition_id: int, ok: bool, server_round: int) -> None:
        """Note whether a partition's reply in this round counts."""
        if ok:
            self._refused_in_row.pop(partition_id, None)
            self._last_round_out.pop(partition_id, None)
            return
        refused = self._refused_in_row.get(partition_id, 0) + 1
        self._refused_in_row[partition_id] = refused
        if 0 < self._after <= refused:
            self._last_round_out[partition_id] = server_round + self._rounds

    def excluded(self, server_round: int) -> set[int]:
        """Return the partitions that are left out of this round."""
        return {p for p, last in self._last_round_out.items() if server_round <= last}

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` needs to go on from here; JSON has no numbers as keys."""
        return {
            "refused-in-row": [list(pair) for pair in sorted(self._refused_in_row.items())],
            "last-round-out": [list(pair) for pair in sorted(self._last_round_out.items())],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], after: int, rounds: int) -> "Quarantine":
        """Return the quarantine that `to_json` described, under these settings.

        A rest that has begun keeps its end when ``rounds`` has changed.
        """
        quarantine = cls(after, rounds)
        quarantine._refused_in_row = _numbers(values["refused-in-row"])
        quarantine._last_round_out = _numbers(values["last-round-out"])
        return quarantine


def _numbers(pairs: Any) -> dict[int, int]:
    return {int(partition_id): int(number) for partition_id, number in pairs}
