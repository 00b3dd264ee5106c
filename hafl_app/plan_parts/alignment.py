"""Alignment: a client's components are rotated toward what it was sent.

Part of a `hafl_app.plan.TrainPlan`, and standard library only as that is.
"""

from dataclasses import dataclass
from typing import Literal

from hafl_app.plan_parts.ranges import is_finite, require


@dataclass(frozen=True)
class Alignment:
    """Rotate what a client has trained toward what it was sent, before the upload.

    Of a module that trains both factors, ``lora_B R`` and ``R^T lora_A`` are uploaded, R a rotation
    of its components: the product stays what it was. See `hafl_app.lowrank.procrustes`.

    Parameters
    ----------
    factor
        Which factor is brought close to what was sent: ``A`` or ``B``.
    weight
        How far: 0 leaves the components as they are, 1 rotates all the way.
    """

    factor: Literal["A", "B"]
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.factor in ("A", "B"), "alignment factor", "one of A, B", self.factor)
        share = is_finite(self.weight) and 0 <= self.weight <= 1
        require(share, "alignment weight", "in [0, 1]", self.weight)
