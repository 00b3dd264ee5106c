"""The directory of all nodes: their profiles, and those left out with the reason."""

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from hafl_app.printable import printable
from hafl_app.server.node_queries import PendingQueries
from hafl_app.server.numbering import Numbering
from hafl_app.wire.node_profile import UNNUMBERED, NodeProfile
from hafl_app.wire.records import CONFIG, LABEL_NAMES

_LOGGER = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_NEWCOMER_SECONDS = 5.0  # wait of a round for a new node's answer; a later one counts later
_START_SECONDS = 30.0
_REFUSED_SECONDS = 30.0


class NodeDirectory:
    """The nodes of a federation by id: asked once each, when they first appear.

    A node that does not answer is left out, and asked again after growing pauses; its answer
    counts from whenever it comes.

    Parameters
    ----------
    timeout_s
        Seconds to wait for answers while no node has given one.
    start_timeout_s
        Seconds that `wait_for_all` waits for nodes; None is as long.
    num_nodes
        Number of nodes that it waits for if some have data of their own: these do not know it.
    label_names
        The run's classes, sent to every node with its query; None while they are not agreed.
    numbering
        Numbers that nodes without one have been given in this run.
    keeps_partitions
        Whether a partition stays with its first node, also while that is offline.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        start_timeout_s: float | None = None,
        num_nodes: int = 1,
        label_names: tuple[str, ...] | None = None,
        numbering: Numbering | None = None,
        keeps_partitions: bool = False,
    ) -> None:
        self._timeout_s = timeout_s
        self._start_timeout_s = timeout_s if start_timeout_s is None else start_timeout_s
        self._num_nodes = num_nodes
        self.label_names = label_names
        self.numbering = numbering or Numbering()
        self._keeps_partitions = keeps_partitions
        self.profiles: dict[int, NodeProfile] = {}
        self._owners: dict[int, int] = {}  # node id by partition
        self.refusals: dict[int, str] = {}  # why nodes cannot take part, until they can
        self._queries = PendingQueries()

    def in_order(self) -> list[NodeProfile]:
        """Return all profiles in partition order."""
        return sorted(self.profiles.values(), key=lambda p: (p.partition_id, p.node_id))

    def refresh(self, grid: Grid) -> list[NodeProfile]:
        """Query nodes that are new or could not take part, and return those that can.

        They come in partition order, and are connected. New nodes are waited for a few seconds,
        and longer while there is no other node.
        """
        end = time.monotonic() + self._timeout_s
        connected = set(grid.get_node_ids())
        asked = connected - set(self.profiles)
        while True:
            self._query(grid, asked, connected, min(_NEWCOMER_SECONDS, self._timeout_s))
            connected = set(grid.get_node_ids())
            present = self._present(connected)
            asked = connected - set(self.profiles) - set(self.refusals)
            if present or not asked or time.monotonic() >= end:
                return self._numbered(present)
            time.sleep(_POLL_SECONDS)

    def _present(self, connected: set[int]) -> list[NodeProfile]:
        return [profile for profile in self.in_order() if profile.node_id in connected]

    def refuse(self, node_id: int, reason: str) -> None:
        """Leave a node out whose answer does not suit the run, until another one does.

        Parameters
        ----------
        reason
            May quote the node; shown on one line, cut and without control characters.
        """
        reason = printable(reason)
        self.profiles.pop(node_id, None)
        if self.refusals.get(node_id) != reason:
            _LOGGER.warning("node %d is left out: %s", node_id, reason)
        self.refusals[node_id] = reason

    def wait_for_all(self, grid: Grid) -> list[NodeProfile]:
        """Wait until all nodes have answered, or the time is over.

        Their number is that of the partitions in their profiles, or the run's if some have data
        of their own. A node that cannot take part has answered too.

        Raises
        ------
        TimeoutError
            If no node that can take part has answered by then, or for half a minute all that did
            cannot; with the reason of one of them.
        """
        started = time.monotonic()
        while True:
            connected = set(grid.get_node_ids())
            unknown = connected - set(self.profiles) - set(self.refusals)
            self._query(grid, unknown, connected, min(_START_SECONDS, self._start_timeout_s))
            profiles = self._present(connected)
            if profiles and len(profiles) + len(self.refusals) >= self._expected(profiles):
                return self._numbered(profiles)
            limit = self._start_timeout_s
            patience = min(limit, _REFUSED_SECONDS) if self._none_can_serve else limit
            if time.monotonic() - started > patience:
                break
            time.sleep(_POLL_SECONDS)
        if not profiles and self.refusals:
            node_id, reason = next(iter(self.refusals.items()))
            raise TimeoutError(
                f"{len(self.refusals)} nodes answered, and none can take part; node {node_id}: "
                f"{reason}"
            )
        if not profiles:
            raise TimeoutError(f"no node answered within {self._start_timeout_s:.0f} s")
        _LOGGER.warning("only %d of %d nodes are here", len(profiles), self._expected(profiles))
        return self._numbered(profiles)

    def _expected(self, profiles: Sequence[NodeProfile]) -> int:
        if any(profile.own_data for profile in profiles):
            return self._num_nodes
        # The number that most nodes state: one that states a billion must not make the others wait.
        return max(statistics.multimode(profile.num_partitions for profile in profiles))

    @property
    def _none_can_serve(self) -> bool:
        return bool(self.refusals) and not self.profiles

    def _query(
        self, grid: Grid, node_ids: set[int], connected: set[int], patience_s: float
    ) -> None:
        """Query these nodes, wait a moment for new ones, and admit all answers that are there."""
        content = RecordDict()
        if self.label_names is not None:
            content[CONFIG] = ConfigRecord({LABEL_NAMES: list(self.label_names)})
        new = self._queries.ask(grid, sorted(node_ids), content)
        answered = []
        for node_id, reply in self._queries.answers(grid, new, patience_s):
            if reply.has_error():
                self.refuse(node_id, reply.error.reason or f"error {reply.error.code}")
                continue
            try:
                # The node that was asked, whatever the reply says of its sender.
                answered.append(replace(NodeProfile.from_reply(reply), node_id=node_id))
            except ValueError as error:
                self.refuse(node_id, str(error))
        self._admit(answered, connected)

    def _admit(self, answered: Sequence[NodeProfile], connected: set[int]) -> None:
        """Admit profiles; a partition belongs to one node."""
        for profile in answered:
            if self.numbering.holds(profile.partition_id):
                number = profile.partition_id
                self.refuse(profile.node_id, f"partition-id {number} is another node's number")
                continue
            owner = self._owners.get(profile.partition_id, profile.node_id)
            is_other = owner != profile.node_id and owner in self.profiles
            if is_other and (owner in connected or self._keeps_partitions):
                self.refuse(
                    profile.node_id, f"partition-id {profile.partition_id} is node {owner}'s"
                )
                continue
            if is_other:
                _LOGGER.warning(
                    "node %d takes partition %d, which was that of node %d, now offline",
                    *(profile.node_id, profile.partition_id, owner),
                )
                del self.profiles[owner]
            self.profiles[profile.node_id] = profile
            if profile.partition_id != UNNUMBERED:
                self._owners[profile.partition_id] = profile.node_id
            self.refusals.pop(profile.node_id, None)

    def _numbered(self, present: list[NodeProfile]) -> list[NodeProfile]:
        """Assign numbers to the nodes that have no number yet, and return those that are present.

        Only now, and to all of them at once: the order of answers must not decide.
        """
        unnumbered = [p for p in self.profiles.values() if p.partition_id == UNNUMBERED]
        if not unnumbered:
            return present
        lowest = max(p.num_partitions for p in self.profiles.values())
        self.numbering.admit((profile.node_id for profile in unnumbered), lowest)
        for profile in unnumbered:
            number = self.numbering.of(profile.node_id)
            numbered = replace(profile, partition_id=number, num_partitions=number + 1)
            self.profiles[profile.node_id] = numbered
        return self._present({profile.node_id for profile in present})
