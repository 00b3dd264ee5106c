"""ModulePlan: what a client holds, trains and uploads of one adapted module.

Part of a `hafl_app.plan.TrainPlan`, and standard library only as that is.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from textwrap import shorten
from typing import Literal, get_args

from hafl_app.plan_parts.component_lists import BIT_LEVELS, format_bits
from hafl_app.plan_parts.ranges import is_finite, is_whole, require
from hafl_app.plan_parts.trained_core import Core

TrainedFactors = Literal["A", "B", "both"]


@dataclass(frozen=True)
class ModulePlan:
    """Components of one adapted module, as indices into the global adapter.

    Parameters
    ----------
    held
        Components the client receives and keeps in its forward pass, in the order sent.
    trainable
        Subset of ``held`` that the client trains and uploads; the others stay frozen.
    scaling
        PEFT's scaling in force on the client (``lora_alpha / r``), above 0. The client unfolds
        it from ``lora_B`` on arrival and folds it in again before the upload.
    bits
        With ``upload=mixed``, how many bits each trainable component's numbers are uploaded in,
        of `BIT_LEVELS` and never rising: those with 0 come last and are trained but not uploaded.
        Else empty.
    factors
        Which factors of the trainable components the client trains and uploads: ``A``, ``B`` or
        ``both``. The other one stays in the forward pass as it was sent.
    budget
        How many of ``trainable`` the client chooses under the plan's `ComponentChoice`, or with
        ``scope=model`` adds to what it chooses from in the whole model; None without such a rule.
    gain
        Factor of the held components in the client's forward pass beside ``scaling``, above 0. It
        is part of no number that travels: a sketch that leaves components out amplifies the rest.
    own_lora_B
        Whether each client has a lora_B of its own, which it trains and keeps: it does not travel.
    core
        Frozen bases with trained cores between them, in place of the trained lora_B: held and
        trainable are then whole blocks, and the cores alone travel. Only with ``factors=B``.
    """

    held: tuple[int, ...]
    trainable: tuple[int, ...]
    scaling: float = 1.0
    bits: tuple[int, ...] = ()
    factors: TrainedFactors = "both"
    budget: int | None = None
    gain: float = 1.0
    own_lora_B: bool = False
    core: Core | None = None

    def __post_init__(self) -> None:
        if len(set(self.held)) != len(self.held) or any(i < 0 for i in self.held):
            raise ValueError(f"held components {self.held} must be distinct and not negative")
        if not set(self.trainable) <= set(self.held) or len(set(self.trainable)) != len(
            self.trainable
        ):
            raise ValueError(
                f"trainable components {self.trainable} must be distinct and among the held "
                f"ones {self.held}"
            )
        valid = is_finite(self.scaling) and self.scaling > 0
        require(valid, "scaling", "above 0 and finite", self.scaling)
        require(is_finite(self.gain) and self.gain > 0, "gain", "above 0 and finite", self.gain)
        fits = self.own_lora_B is False or (self.own_lora_B is True and self.factors == "both")
        require(fits, "own_lora_B", "false, or true with factors=both", self.own_lora_B)
        known = get_args(TrainedFactors)
        require(self.factors in known, "factors", f"one of {', '.join(known)}", self.factors)
        self._check_bits()
        if self.core is not None:
            self._check_core(self.core)
        if self.budget is not None:
            within = is_whole(self.budget, at_least=0) and self.budget <= len(self.trainable)
            require(within, "budget", f"from 0 to {len(self.trainable)}", self.budget)

    def _check_bits(self) -> None:
        if self.bits and len(self.bits) != len(self.trainable):
            raise ValueError(
                f"bits of {len(self.bits)} components, expected one for each of the "
                f"{len(self.trainable)} trainable"
            )
        if odd := set(self.bits) - set(BIT_LEVELS):
            raise ValueError(f"bits of {min(odd)} are not one of {BIT_LEVELS}")
        falls = all(a >= b for a, b in pairwise(self.bits))
        require(falls, "bits", "never rising", shorten(format_bits(self.bits), 80))

    def _check_core(self, core: Core) -> None:
        plain = self.factors == "B" and not self.bits and self.gain == 1 and self.budget is None
        require(plain, "core", "null with such a module", core)
        core.check(self.held)
        core.check(self.trainable)

    @cached_property
    def trainable_slots(self) -> tuple[int, ...]:
        """Positions of the trainable components among the held ones."""
        slot = {component: position for position, component in enumerate(self.held)}
        return tuple(slot[component] for component in self.trainable)

    @property
    def frozen_slots(self) -> tuple[int, ...]:
        """Positions of the frozen components among the held ones."""
        trainable = set(self.trainable)
        return tuple(p for p, component in enumerate(self.held) if component not in trainable)

    @property
    def trains_A(self) -> bool:
        """Whether lora_A of the trainable components is trained."""
        return self.factors != "B"

    @property
    def trains_B(self) -> bool:
        """Whether lora_B of the trainable components is trained."""
        return self.factors != "A"

    @property
    def is_whole(self) -> bool:
        """Whether both factors of all that is held are trained and uploaded."""
        return self.held == self.trainable and self.uploads == "both"

    @property
    def uploads(self) -> TrainedFactors:
        """The trained factors without one that the client keeps."""
        return "A" if self.own_lora_B else self.factors

    def uploaded_sides(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return ``(out_features, in_features)`` of a weight, 0 for a factor not uploaded.

        A component's column of lora_B has out_features numbers, its row of lora_A in_features. Of
        a core it is a column of the core.
        """
        if self.core is not None:
            return self.core.size, 0
        out_features, in_features = shape
        return out_features * (self.uploads != "A"), in_features * (self.uploads != "B")

    def held_sides(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return ``(out_features, in_features)`` of what the client is sent, 0 for a factor it has.

        Parameters
        ----------
        shape
            ``(out_features, in_features)`` of the weight.
        """
        if self.core is not None:
            return self.core.size, 0
        out_features, in_features = shape
        return out_features * (not self.own_lora_B), in_features

    @property
    def num_trained(self) -> int:
        """Number of components that are trained, of which the client may choose which."""
        return len(self.trainable) if self.budget is None else self.budget

    @property
    def num_uploaded(self) -> int:
        """Number of trainable components that are uploaded, counted from the first."""
        return len(self.trainable) - self.bits.count(0)
