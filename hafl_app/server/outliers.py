"""Outliers of a round: updates out of proportion are rejected, large ones may be scaled down."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from hafl_app.lowrank.change import clip_factors, norm_bound, shrink_change
from hafl_app.server.round_messages import Reply
from hafl_app.server.update import ClientUpdate

# More data means more steps, and a step moves an adapter as far as any other at the most. Beyond
# this, a claim of many examples buys nothing.
_LARGEST_ALLOWANCE = 100.0
# Honest clients' scores differ by their data, but not by this much; and of fewer clients than
# these, none is usual.
_LARGEST_IMPORTANCE, _FEWEST_SCORED = 1000.0, 5


def reject_outliers(replies: Sequence[Reply], ratio: float | None) -> list[Reply]:
    """Return the replies, those out of proportion to the rest of the round rejected.

    Parameters
    ----------
    ratio
        See `norm_outliers`; None rejects none, not even for its importance scores.
    """
    updates = [reply.update for reply in replies if reply.update is not None]
    if ratio is None or not updates:
        return list(replies)
    examples = [update.num_examples for update in updates]
    sizes = norm_outliers([update.size for update in updates], examples, ratio)
    scores = importance_outliers([_mean_importance(update) for update in updates])
    reasons = iter([size or score for size, score in zip(sizes, scores, strict=True)])
    return [
        reply.rejected(reason) if reply.update is not None and (reason := next(reasons)) else reply
        for reply in replies
    ]


def clip_updates(updates: Sequence[ClientUpdate], ratio: float | None) -> list[ClientUpdate]:
    """Return the updates, each change at most ``ratio`` times the round's median size."""
    if ratio is None:
        return list(updates)
    factors = clip_factors([update.size for update in updates], ratio)
    return [
        replace(update, adapter=shrink_change(update.adapter, update.before, factor))
        for update, factor in zip(updates, factors, strict=True)
    ]


def norm_outliers(sizes: Sequence[float], num_examples: Sequence[int], ratio: float) -> list[str]:
    """Judge the norm of each update of a round: the reason to reject it, or an empty string.

    The bound is `hafl_app.lowrank.change.norm_bound`. A client with more examples than the median
    may have moved that many times further, up to 100 times: it took as many more steps.

    Parameters
    ----------
    sizes
        `hafl_app.lowrank.change.change_size` of every update that is fine by itself.
    num_examples
        Of the same clients, at least 1.
    ratio
        Robust standard deviations that a size may lie above the median, above 0.

    Notes
    -----
    Only upwards: a small change does little harm. And only gross scaling is caught, not
    a wrong direction at the usual size; which robust rules are for.
    """
    usual = statistics.median(num_examples or [1])
    allowances = [min(max(n / usual, 1.0), _LARGEST_ALLOWANCE) for n in num_examples]
    bound = norm_bound([s / a for s, a in zip(sizes, allowances, strict=True)], ratio)
    return [
        f"change of {size:.3g} per number, expected at most {bound * allowance:.3g} in this round"
        if size > bound * allowance
        else ""
        for size, allowance in zip(sizes, allowances, strict=True)
    ]


def importance_outliers(means: Sequence[float]) -> list[str]:
    """Return why each client's importance scores are out of proportion, or an empty string.

    A mean of scores would be that of the client with the largest: one could decide which
    components that all clients train. Only gross claims are caught, a thousand times the median.

    Parameters
    ----------
    means
        Of all scores of a client, at least 0; 0 of one that measured nothing. Fewer than five
        above 0 have no bound.
    """
    measured = [mean for mean in means if mean > 0]
    if len(measured) < _FEWEST_SCORED:
        return [""] * len(means)
    bound = _LARGEST_IMPORTANCE * statistics.median(measured)
    return [
        f"importance of {mean:.3g} in the mean, expected at most {bound:.3g} in this round"
        if mean > bound
        else ""
        for mean in means
    ]


def _mean_importance(update: ClientUpdate) -> float:
    scores = list(update.importance.values())
    count = sum(len(one) for one in scores)
    return sum(float(one.double().sum()) for one in scores) / count if count else 0.0
