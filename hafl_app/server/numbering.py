"""Numbers for nodes that hold data of their own and so have no partition to be known by.

Quarantine, seeds and the order of folding go by ``partition_id``: the server gives such a node
one, and keeps it for the run.
"""

from collections.abc import Iterable, Mapping


class Numbering:
    """Node id to number: in the order of first sight, those seen together in order of their id.

    Parameters
    ----------
    numbers
        Given earlier in the same run.
    """

    def __init__(self, numbers: Mapping[int, int] | None = None) -> None:
        self._numbers = dict(numbers or {})

    def admit(self, node_ids: Iterable[int], lowest: int) -> None:
        """Assign a number to each node without one: at least ``lowest``, and above those given."""
        for node_id in sorted(set(node_ids) - set(self._numbers)):
            highest = max(self._numbers.values(), default=-1)
            self._numbers[node_id] = max(lowest, highest + 1)

    def of(self, node_id: int) -> int:
        """Return the number of an admitted node."""
        return self._numbers[node_id]

    def holds(self, number: int) -> bool:
        """Whether a number was given to a node."""
        return number in self._numbers.values()

    def to_json(self) -> dict[str, int]:
        """Return the numbers by node id, as JSON has them."""
        return {str(node_id): number for node_id, number in self._numbers.items()}

    @classmethod
    def from_json(cls, numbers: Mapping[str, int]) -> "Numbering":
        """Read what `to_json` returned."""
        return cls({int(node_id): number for node_id, number in numbers.items()})
