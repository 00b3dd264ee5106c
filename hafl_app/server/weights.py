"""Weight of a client in averages: its stated examples, within bounds that it cannot move."""

import logging
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from hafl_app.server.settings import FederationSettings
from hafl_app.wire.node_profile import NodeProfile

_LOGGER = logging.getLogger(__name__)
_FEWEST_NODES = 3  # of two, either may be the one that does not state the truth


@dataclass(frozen=True)
class ExampleBound:
    """The most examples that any client counts as.

    Parameters
    ----------
    most
        At least 1; None is no bound.
    setting
        Which setting it comes from, as it would be typed.
    uniform
        Whether every client counts as one example.
    """

    most: int | None = None
    setting: str = ""
    uniform: bool = False

    @classmethod
    def of(cls, federation: FederationSettings, nodes: Iterable[NodeProfile]) -> "ExampleBound":
        """Return the bound of a round: the operator's, or that of the median node if it is lower.

        Parameters
        ----------
        nodes
            All that may train; at most half of them may state what is not true.
        """
        if federation.weighting == "uniform":
            return cls(uniform=True)
        bounds = []
        if (most := federation.max_examples_per_node) is not None:
            bounds.append((most, f"federation.max_examples_per_node={most}"))
        stated = [node.num_examples for node in nodes]
        ratio = federation.max_examples_ratio
        if ratio is not None and len(stated) >= _FEWEST_NODES:
            most = max(1, int(ratio * statistics.median(stated)))
            bounds.append((most, f"federation.max_examples_ratio={ratio:g}"))
        return cls(*min(bounds)) if bounds else cls()

    def count(self, stated: int, profile: NodeProfile) -> int:
        """Return the examples a client counts as, at least 1; log if they are fewer than stated."""
        if self.uniform:
            return 1
        if self.most is None or stated <= self.most:
            return stated
        _LOGGER.warning(
            "node %d (partition %d): %d of the %d examples that it states count (%s)",
            *(profile.node_id, profile.partition_id, self.most, stated, self.setting),
        )
        return self.most


UNBOUNDED = ExampleBound()
"""Every client counts as it states."""
