"""Work of a training: the rows that went through the model, by plan and length."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hafl_app.plan import TrainPlan
from hafl_app.training.batches import Examples, MicroBatches


@dataclass(frozen=True)
class Pass:
    """Rows that went forward and back under one plan.

    Parameters
    ----------
    plan
        As it was loaded: a probe's, or the training's after the client's choice.
    rows
        Tokens of a row, padding included, to how many rows were that long. Images have 0 tokens.
    """

    plan: TrainPlan
    rows: Mapping[int, int] = field(default_factory=dict)


class Work:
    """Counts rows; what memory forces into smaller parts later is counted as it was asked for.

    Parameters
    ----------
    examples
        That the rows are of.
    texts_at_once
        Rows that go through the model at once, each as long as the longest of them.
    """

    def __init__(self, examples: Examples, texts_at_once: int) -> None:
        self._lengths = np.diff(examples.offsets)
        self._parts = MicroBatches(texts_at_once)
        self._passes: list[tuple[TrainPlan, Counter[int]]] = []

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What was counted, in the order in which plans were loaded."""
        return tuple(Pass(plan, dict(rows)) for plan, rows in self._passes if rows)

    def begin(self, plan: TrainPlan) -> None:
        """Count under another plan from now on."""
        self._passes.append((plan, Counter()))

    def add(self, rows: NDArray[np.int64]) -> None:
        """Count a batch."""
        _, counted = self._passes[-1]
        for part in self._parts.split(rows):
            counted[int(self._lengths[part].max())] += len(part)
