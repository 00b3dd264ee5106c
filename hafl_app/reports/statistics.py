"""Statistics over seeds: mean and spread, and paired differences with an interval.

SciPy is imported where an interval is computed, since it takes a second.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Spread:
    """Values of several seeds."""

    each: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean; NaN of none."""
        return statistics.fmean(self.each) if self.each else math.nan

    @property
    def sd(self) -> float:
        """Sample standard deviation; NaN of fewer than two, or if one is not finite."""
        known = len(self.each) > 1 and all(map(math.isfinite, self.each))
        return statistics.stdev(self.each) if known else math.nan


@dataclass(frozen=True)
class Paired:
    """Differences of two methods' scores, one a seed, and an interval of their mean.

    The interval is Student's, for differences that are normally distributed over the seeds, with
    ``n - 1`` degrees of freedom: at three seeds 2.5 standard deviations of the differences to
    either side.
    """

    each: tuple[float, ...]
    confidence: float = CONFIDENCE

    @classmethod
    def of(cls, scores: Mapping[int, float], baseline: Mapping[int, float]) -> "Paired":
        """Return the differences on the seeds that both know.

        Parameters
        ----------
        scores, baseline
            Seed to score; one that is not finite does not count.
        """
        return cls(
            tuple(
                score - baseline[seed]
                for seed, score in scores.items()
                if seed in baseline and math.isfinite(score) and math.isfinite(baseline[seed])
            )
        )

    @property
    def mean(self) -> float:
        """Mean difference; NaN of none."""
        return statistics.fmean(self.each) if self.each else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper end; None of fewer than two differences, which have no spread."""
        n = len(self.each)
        if n < 2:
            return None
        from scipy import stats  # noqa: PLC0415  takes a second

        # Of differences that are alike stats.t.interval, and a test's own interval, are NaN.
        half = stats.t.ppf((1 + self.confidence) / 2, n - 1) * statistics.stdev(self.each)
        half /= math.sqrt(n)
        return self.mean - float(half), self.mean + float(half)
