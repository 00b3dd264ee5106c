"""Participation: nodes the run can serve, client selection, quarantine, and rank cuts."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from flwr.serverapp import Grid

from hafl_app.server.client_sampling import sample_poisson, sample_profiles, sample_size
from hafl_app.server.compatibility import check_privacy, check_rank_patterns, check_scaffold
from hafl_app.server.method import Method, StrategyError
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.server.quarantine import Quarantine
from hafl_app.server.round_messages import Reply
from hafl_app.wire.faults import Fault
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import SECONDS

_LOGGER = logging.getLogger(__name__)
_MOST_LEFT_OUT = 1 / 3  # of the nodes that are there before round 1


class Participation:
    """The nodes of one run.

    Parameters
    ----------
    method
        Checks the ranks that it can serve.

    Attributes
    ----------
    directory
        All nodes that have answered.
    held_out
        Partitions that never train.
    quarantine
        Nodes that rest because their replies kept being rejected.
    rank_limits
        By partition, of nodes that ran out of memory.
    seconds
        By node id, the seconds of its last training.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self.directory = NodeDirectory(method.options.federation.round_timeout_s)
        self.held_out: frozenset[int] = frozenset()
        self.quarantine = Quarantine(0, 1)
        self.rank_limits: Mapping[int, int] = {}
        self.seconds: dict[int, float] = {}
        self._accepted: dict[int, NodeProfile] = {}  # by node id
        self._accepted_ranks: Counter[int] = Counter()
        self._failed_this_round: set[int] = set()  # node ids

    # ---- before round 1 --------------------------------------------------------------------

    def wait_for_nodes(self, grid: Grid, directory: NodeDirectory) -> list[NodeProfile]:
        """Wait for the nodes' profiles, and leave out nodes that the run cannot serve.

        Returns
        -------
        list of NodeProfile
            Those that take part, in partition order.

        Raises
        ------
        StrategyError
            If none is left, or fewer than a round needs.
        TimeoutError
            If no node answers.
        """
        self.directory = directory
        self._accept(directory.wait_for_all(grid))
        self._check_number()
        return directory.in_order()

    def _check_number(self) -> None:
        """Refuse a run whose rounds would all fail, for too few nodes are left to be asked."""
        federation, trained = self._method.options.federation, len(self.trainable())
        asked = sample_size(federation.fraction_train, trained)
        if federation.min_replies > asked:
            refusals = self.directory.refusals
            left_out = f"; {len(refusals)} nodes are left out" if refusals else ""
            raise StrategyError(
                f"federation.min_replies={federation.min_replies}: only {asked} of {trained} "
                f"clients are asked in a round{left_out}"
            )

    def _accept(self, profiles: Sequence[NodeProfile]) -> None:
        """Accept the nodes, but for odd ones that the method cannot serve beside the others.

        Those of the most common ranks come first, so that one odd node ends no run. Where many
        would be left out, or all, it is the run that does not fit, and it is refused.
        """
        common = Counter(profile.ranks for profile in profiles)
        ordered = sorted(profiles, key=lambda p: (-common[p.ranks], p.partition_id, p.node_id))
        reasons = [self._reject_reason(profile) for profile in ordered]
        for profile, reason in zip(ordered, reasons, strict=True):
            if reason:
                self.directory.refuse(profile.node_id, reason)
        left_out = [reason for reason in reasons if reason]
        many = len(left_out) > max(1, _MOST_LEFT_OUT * len(profiles))
        if left_out and (many or len(left_out) == len(profiles)):
            self._method.check([rank for profile in profiles for rank in profile.ranks])
            raise StrategyError(left_out[0])

    def prepare(self) -> None:
        """Check the accepted nodes against the adapter, once there is one.

        Raises
        ------
        StrategyError
            If the method cannot serve them with it, or too few of them for a round.
        """
        quarantine = self._method.options.federation.quarantine
        self.quarantine = Quarantine(quarantine.after, quarantine.rounds)
        self._accepted, self._accepted_ranks = {}, Counter()
        self._accept(self.directory.in_order())
        if self.directory.refusals:
            self._check_number()

    def trainable(self) -> list[NodeProfile]:
        """Return the known nodes that may train, in partition order."""
        return [p for p in self.directory.in_order() if p.partition_id not in self.held_out]

    # ---- selection -------------------------------------------------------------------------

    def select_for_training(self, server_round: int, attempt: int, grid: Grid) -> list[NodeProfile]:
        """Select the clients of a round; a repeated one prefers those that have not failed in it.

        Parameters
        ----------
        attempt
            0, or how often the round has been repeated.
        """
        if not attempt:
            self._failed_this_round = set()
        options, present = self._method.options, self._present(server_round, grid)
        fraction = options.federation.fraction_train
        if options.privacy.kind == "central_dp":
            return sample_poisson(present, fraction, options.privacy.noise_key, server_round)
        fresh = [p for p in present if p.node_id not in self._failed_this_round]
        wanted = sample_size(fraction, len(present))
        candidates = fresh if len(fresh) >= wanted else present
        share = wanted / len(candidates) if candidates else 0.0
        phase = f"train/{attempt}" if attempt else "train"
        return sample_profiles(candidates, share, options.seed, server_round, phase)

    def select_for_evaluation(self, server_round: int, grid: Grid) -> list[NodeProfile]:
        """Select the clients that evaluate what they would receive next."""
        options = self._method.options
        present = self._present(server_round, grid)
        fraction = options.federation.fraction_evaluate
        return sample_profiles(present, fraction, options.seed, server_round, "evaluate")

    def reachable(self, server_round: int, grid: Grid) -> list[NodeProfile]:
        """Return all that could be selected for training, in partition order."""
        return self._present(server_round, grid)

    def held_out_present(self, grid: Grid) -> list[NodeProfile]:
        """Return the connected nodes that never train."""
        return [p for p in self._connected(grid) if p.partition_id in self.held_out]

    def _present(self, server_round: int, grid: Grid) -> list[NodeProfile]:
        """Return the connected nodes that may be selected in a round.

        Never one that is held out; one in quarantine only if there is no other.
        """
        present = [p for p in self._connected(grid) if p.partition_id not in self.held_out]
        excluded = self.quarantine.excluded(server_round)
        rested = [p for p in present if p.node_id not in excluded]
        # Under central privacy a node may decide about itself, but never about another.
        return rested if self._method.options.privacy.kind == "central_dp" else rested or present

    def _connected(self, grid: Grid) -> list[NodeProfile]:
        return [p for p in self.directory.refresh(grid) if self.accepts(p)]

    # ---- which nodes the run can serve -----------------------------------------------------

    def accepts(self, profile: NodeProfile) -> bool:
        """Whether the run can serve a node; one that it cannot is left out, with the reason."""
        if reason := self._reject_reason(profile):
            self.directory.refuse(profile.node_id, reason)
        return not reason

    def _reject_reason(self, profile: NodeProfile) -> str:
        """Return the reason why a node cannot join those accepted so far; empty if it can."""
        known = self._accepted.get(profile.node_id)
        if known is profile or known == profile:
            return ""
        ranks = self._accepted_ranks.copy()
        ranks.subtract(known.ranks if known else ())
        try:
            # Which ranks occur, not how often: thousands of nodes may join, one after another.
            self._method.check(sorted({*(+ranks), *profile.ranks}))
            if modules := self._method.global_adapter.modules:
                check_rank_patterns(profile, modules)
                check_privacy(self._method, [profile])
                check_scaffold(self._method, profile)
        except StrategyError as error:
            return str(error)
        self._accepted[profile.node_id] = profile
        ranks.update(profile.ranks)
        self._accepted_ranks = ranks
        return ""

    # ---- after a reply ---------------------------------------------------------------------

    def record(self, replies: Iterable[Reply]) -> None:
        """Record replies: failures, durations, rank cuts and quarantine."""
        for reply in replies:
            profile = reply.profile
            if SECONDS in reply.metrics:
                self.seconds[profile.node_id] = reply.metrics[SECONDS]
            if reply.error:
                self._failed_this_round.add(profile.node_id)
            cut = reply.fault == Fault.OUT_OF_MEMORY and self._cut_rank(profile)
            counts = not reply.error or cut
            self.quarantine.record(profile.node_id, counts, reply.server_round)

    def _cut_rank(self, profile: NodeProfile) -> bool:
        """Halve the budget of a node that ran out of memory, if the method can serve that."""
        limit = self.rank_limits.get(profile.partition_id, max(profile.ranks)) // 2
        limits = {**self.rank_limits, profile.partition_id: limit}
        ranks = {
            min(rank, limits.get(p.partition_id, rank))
            for p in self.directory.in_order()
            for rank in p.ranks
        }
        try:
            self._method.check(sorted(ranks))
        except StrategyError as error:
            _LOGGER.warning("node %d keeps its rank: %s", profile.node_id, error)
            return False
        self.rank_limits = limits
        _LOGGER.warning(
            "node %d (partition %d) ran out of memory: rank %d from now on",
            *(profile.node_id, profile.partition_id, limit),
        )
        return True
