"""Sizes of a round's updates, compared: outliers are refused, large ones may be scaled down."""

from collections.abc import Sequence
from dataclasses import replace

from hafl_app.lowrank.change import clip_factors, shrink_change
from hafl_app.server.reply_validation import norm_outliers
from hafl_app.server.round_messages import ClientUpdate, Judged


def refuse_outliers(judged: Sequence[Judged], ratio: float | None) -> list[Judged]:
    """Return the replies, those out of proportion to the rest of the round refused.

    Parameters
    ----------
    ratio
        See `hafl_app.server.reply_validation.norm_outliers`; None refuses nobody.
    """
    updates = [one.update for one in judged if one.update is not None]
    if ratio is None or not updates:
        return list(judged)
    examples = [update.num_examples for update in updates]
    reasons = iter(norm_outliers([update.size for update in updates], examples, ratio))
    return [
        one.refused(reason) if one.update is not None and (reason := next(reasons)) else one
        for one in judged
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
