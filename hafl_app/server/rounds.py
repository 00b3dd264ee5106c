"""The rounds of a federation: one after another, repeated when they did not work.

Flower's own `Strategy.start` runs every round once, from the first, and ends the run at the first
bad one. The hooks are the same; the loop around them is this one.
"""

import logging
from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from hafl_app.server.closed_form import TooFewSumsError
from hafl_app.server.coordinator import Strategy, TooFewRepliesError
from hafl_app.server.method import StrategyError
from hafl_app.server.options import RunOptions
from hafl_app.server.replies import all_replies, replies_in_order

_LOGGER = logging.getLogger(__name__)


class RoundFailedError(RuntimeError):
    """A round that did not work however often it was repeated; the adapter is as before it."""


def run_rounds(
    strategy: Strategy, grid: Grid, first_round: int, after_round: Callable[[int], bool]
) -> None:
    """Run the rounds from ``first_round`` to the last of a prepared strategy.

    Parameters
    ----------
    after_round
        Called with the number of each round that is finished; says whether it was the last one.

    Raises
    ------
    StrategyError
        If the privacy budget does not suffice for a single round.
    RoundFailedError
        If too few replies count in a round and in all its repeats.
    """
    last = _last_round(strategy.options)
    for server_round in range(first_round, last + 1):
        _train(strategy, grid, server_round)
        solve_head(strategy, grid, server_round)
        if server_round == last:  # so that its bytes are in the last round
            solve_heads_of_ranks(strategy, grid, server_round)
        _evaluate(strategy, grid, server_round)
        if after_round(server_round):
            return


def _last_round(options: RunOptions) -> int:
    """Return the number of the last round, and say so if the privacy budget ends before."""
    last = options.last_round
    limit = f"privacy.max_epsilon={options.privacy.max_epsilon}"
    if last < min(1, options.federation.num_rounds):
        raise StrategyError(f"{limit}: the first round would already spend more")
    if last < options.federation.num_rounds:
        _LOGGER.warning(
            "%s is spent after round %d of %d", limit, last, options.federation.num_rounds
        )
    return last


def _train(strategy: Strategy, grid: Grid, server_round: int) -> None:
    attempts = 1 + strategy.options.federation.max_retries
    for attempt in range(1, attempts + 1):
        try:
            _train_once(strategy, grid, server_round)
        except TooFewRepliesError as error:
            _LOGGER.warning("%s (attempt %d of %d)", error, attempt, attempts)
            if attempt == attempts:
                raise RoundFailedError(
                    f"{error} (the last of {attempts} attempts; the log names each reason)"
                ) from error
        else:
            return


def solve_head(strategy: Strategy, grid: Grid, server_round: int) -> None:
    """Solve the head from sums of features, if it is due after this round.

    Later than before round 1, a head that cannot be solved stays as it is, which is logged.

    Raises
    ------
    RoundFailedError
        If before round 1 the sums of too few clients count, also in all repeats.
    """
    if not strategy.options.is_head_due(server_round):
        return
    if server_round == 0:
        strategy.coordinator.closed_form.warn_of_no_effect()
    attempts = 1 + strategy.options.federation.max_retries
    for attempt in range(1, attempts + 1):
        try:
            strategy.coordinator.closed_form.solve(server_round, grid)
        except TooFewSumsError as error:
            _LOGGER.warning("%s (attempt %d of %d)", error, attempt, attempts)
            if attempt == attempts and server_round == 0:
                raise RoundFailedError(
                    f"{error} (the last of {attempts} attempts; the log names each reason)"
                ) from error
        else:
            return
    _LOGGER.warning("round %d: the head stays as it is", server_round)


def solve_heads_of_ranks(strategy: Strategy, grid: Grid, server_round: int) -> None:
    """Solve the heads of the last adapter's cuts, if the settings ask for them."""
    closed_form = strategy.options.closed_form
    if closed_form is not None and closed_form.per_rank:
        strategy.coordinator.closed_form.solve_for_ranks(server_round, grid)


def _train_once(strategy: Strategy, grid: Grid, server_round: int) -> None:
    federation = strategy.options.federation
    watch = strategy.coordinator.watch
    watch.begin("train", server_round)
    messages = strategy.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
    if federation.streaming:
        stream = replies_in_order(
            grid, messages, federation.round_timeout_s, federation.stream_buffer, watch=watch
        )
        strategy.coordinator.aggregate_stream(server_round, stream)
    else:
        replies = all_replies(
            grid,
            messages,
            federation.round_timeout_s,
            strategy.coordinator.participation.seconds,
            watch=watch,
        )
        strategy.aggregate_train(server_round, replies)


def _evaluate(strategy: Strategy, grid: Grid, server_round: int) -> None:
    watch = strategy.coordinator.watch
    watch.begin("evaluate", server_round)
    messages = strategy.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), grid)
    timeout_s = strategy.options.federation.round_timeout_s
    replies = all_replies(grid, messages, timeout_s, watch=watch)
    strategy.aggregate_evaluate(server_round, replies)
