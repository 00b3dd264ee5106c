"""TrainPlan: what the server asks one client to do in one round.

The strategy writes the plan, the client executes it; a client knows no method names. Standard
library only, because every other room reads it.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from math import floor
from textwrap import shorten
from typing import Any, Literal, get_args

from hafl_app.component_choice import ComponentChoice
from hafl_app.component_lists import (
    BIT_LEVELS,
    format_bits,
    format_indices,
    parse_bits,
    parse_indices,
)
from hafl_app.own_weight import OwnWeight
from hafl_app.trained_core import Core

HeadPolicy = Literal["averaged", "frozen", "local", "sent"]
ImportanceMeasure = Literal["none", "sensitivity", "smoothed", "adalora"]
NumberFormat = Literal["fp32", "bf16", "int8", "mixed", "sparse"]
TrainedFactors = Literal["A", "B", "both"]

NUMBER_BYTES: Mapping[NumberFormat, int] = {
    "fp32": 4,
    "bf16": 2,
    "int8": 1,
    "mixed": 2,
    "sparse": 4,
}
"""Bytes of a number in each format; of ``mixed``, where every component has its own, at most.

Of ``sparse`` only the numbers that are kept travel, with a bit for each number there is."""

_SCALE_BYTES = 2  # bfloat16; a component has one for its row of lora_A, and one for its column


def largest_code(bits: int) -> int:
    """Return the largest code of ``bits`` bits; the smallest is its negative, and one is unused."""
    return int(2 ** (bits - 1) - 1)


def component_bytes(bits: int, out_features: int, in_features: int) -> int:
    """Return the bytes of one component in an upload: its vectors of codes, a scale for each.

    ``ceil(b m / 8) + 2 + ceil(b n / 8) + 2`` for a weight of m x n; 0 for 0 bits.

    Parameters
    ----------
    out_features, in_features
        Of the weight; 0 for the factor that is not uploaded, see `ModulePlan.uploaded_sides`.
    """
    lengths = (length for length in (out_features, in_features) if length and bits)
    return sum(-(-bits * length // 8) + _SCALE_BYTES for length in lengths)


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_whole(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_finite(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # also False for NaN, and for an int beyond a float


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
        valid = _is_finite(self.scaling) and self.scaling > 0
        _require(valid, "scaling", "above 0 and finite", self.scaling)
        _require(_is_finite(self.gain) and self.gain > 0, "gain", "above 0 and finite", self.gain)
        fits = self.own_lora_B is False or (self.own_lora_B is True and self.factors == "both")
        _require(fits, "own_lora_B", "false, or true with factors=both", self.own_lora_B)
        known = get_args(TrainedFactors)
        _require(self.factors in known, "factors", f"one of {', '.join(known)}", self.factors)
        self._check_bits()
        if self.core is not None:
            self._check_core(self.core)
        if self.budget is not None:
            within = _is_whole(self.budget, at_least=0) and self.budget <= len(self.trainable)
            _require(within, "budget", f"from 0 to {len(self.trainable)}", self.budget)

    def _check_bits(self) -> None:
        if self.bits and len(self.bits) != len(self.trainable):
            raise ValueError(
                f"bits of {len(self.bits)} components, expected one for each of the "
                f"{len(self.trainable)} trainable"
            )
        if odd := set(self.bits) - set(BIT_LEVELS):
            raise ValueError(f"bits of {min(odd)} are not one of {BIT_LEVELS}")
        falls = all(a >= b for a, b in pairwise(self.bits))
        _require(falls, "bits", "never rising", shorten(format_bits(self.bits), 80))

    def _check_core(self, core: Core) -> None:
        plain = self.factors == "B" and not self.bits and self.gain == 1 and self.budget is None
        _require(plain, "core", "null with such a module", core)
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


@dataclass(frozen=True)
class TailPruning:
    """Regularize a client's last components, and drop them if they shrank.

    The loss gains ``weight * ||B_tail||_F * ||A_tail||_F``, with the scaling unfolded, where the
    tail starts at ``floor(decay * rank)`` of a module's trainable components, but never below
    ``min_rank``. If, after training, the tail's norm product is below its value before, only the
    components before the tail are uploaded.

    Parameters
    ----------
    decay
        Share of the components before the tail, in [0, 1].
    weight
        Factor of the regularizer in the loss, at least 0.
    min_rank
        Lowest rank that pruning leaves, at least 0.
    prune
        Whether a tail that shrank is dropped.
    """

    decay: float
    weight: float
    min_rank: int
    prune: bool = True

    def __post_init__(self) -> None:
        share = _is_finite(self.decay) and 0 <= self.decay <= 1
        _require(share, "tail decay", "in [0, 1]", self.decay)
        weighs = _is_finite(self.weight) and self.weight >= 0
        _require(weighs, "tail weight", "at least 0 and finite", self.weight)
        whole = _is_whole(self.min_rank, at_least=0)
        _require(whole, "tail min_rank", "a whole number from 0", self.min_rank)
        _require(isinstance(self.prune, bool), "tail prune", "true or false", self.prune)

    def start(self, rank: int) -> int:
        """First component of the tail of a module with ``rank`` components."""
        # 0.29 * 100 is 28.999...96 in binary.
        return min(rank, max(self.min_rank, floor(self.decay * rank + 1e-9)))

    def uploads(self, rank: int) -> set[int]:
        """Return the ranks that a module of ``rank`` trained components may be uploaded with."""
        return {rank, self.start(rank)} if self.prune else {rank}


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
        _require(self.factor in ("A", "B"), "alignment factor", "one of A, B", self.factor)
        share = _is_finite(self.weight) and 0 <= self.weight <= 1
        _require(share, "alignment weight", "in [0, 1]", self.weight)


@dataclass(frozen=True)
class TrainPlan:
    """Request of the server to one client: what to hold, train, measure and upload.

    Parameters
    ----------
    modules
        Module name to its components.
    head
        ``averaged``: the head travels and is trained. ``frozen``: it is not trained and does
        not travel; it follows from the seed. ``local``: each client keeps its own. ``sent``: it
        travels to the client, which does not train it.
    importance
        Importance to measure from the gradients of the trainable components, see
        `hafl_app.lowrank.importance`.
    importance_smoothing
        Decay of the measurement's moving averages over local steps, in [0, 1).
    probe_batches
        Batches on which the importance of *all* held components is measured before training;
        0 for none.
    tail
        Tail regularizer and self-pruning, if any.
    local_epochs
        Passes over the local training data.
    max_steps
        Upper limit of optimizer steps, 0 for none.
    upload
        Numbers of the uploaded factors. ``fp32``: the factors themselves. Otherwise their change
        against what was sent, rounded, see `hafl_app.lowrank.quantize`; with ``mixed`` each
        component's to as many bits as its `ModulePlan` says. With ``sparse`` the largest numbers of
        the change, the share ``density`` of them. The head is always fp32.
    error_feedback
        Whether the client keeps what rounding lost of a component's change, and adds it to that
        component's next one; only where rounding loses something.
    choice
        Rule by which the client chooses what it trains of the trainable components, within each
        module's ``budget``; None: it trains them all. Not with ``upload=mixed`` or ``sparse``,
        ``tail`` or ``importance``.
    density
        With ``upload=sparse``, the share of the numbers of all factors that travels each way, in
        (0, 1); else 1.
    align
        Rotation of the trained components toward those that were sent, if any. It mixes them: only
        where each module trains the first of its components, all that it holds, and nothing else
        (``tail``, ``importance``, ``choice``, ``upload=mixed`` or ``sparse``) tells them apart.
    proximal
        Weight of the term that keeps trained numbers near what was sent, at least 0, see
        `hafl_app.training.proximal`.
    logit_adjustment
        ``tau``, at least 0, by which the loss adjusts logits by the client's own classes, see
        `hafl_app.training.own_classes`; None: plain cross entropy.
    own_weight
        Rule by which the client weighs its own part of a secure sum; None: by ``num_examples``.
        Only where it trains and uploads all that it holds, so without a ``choice`` or a tail that
        is dropped.
    rates
        Learning rates over ``client.learning_rate``, each in (0, 1], of equal parts of the
        training, one after another; in a round there is one.
    """

    modules: Mapping[str, ModulePlan]
    head: HeadPolicy = "averaged"
    importance: ImportanceMeasure = "none"
    importance_smoothing: float = 0.85
    probe_batches: int = 0
    tail: TailPruning | None = None
    local_epochs: int = 1
    max_steps: int = 0
    upload: NumberFormat = "fp32"
    error_feedback: bool = False
    choice: ComponentChoice | None = None
    density: float = 1.0
    align: Alignment | None = None
    proximal: float = 0.0
    logit_adjustment: float | None = None
    own_weight: OwnWeight | None = None
    rates: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        # A plan comes over the wire: a word that no branch knows would silently train by default.
        for name, value, allowed in (
            ("head", self.head, get_args(HeadPolicy)),
            ("importance", self.importance, get_args(ImportanceMeasure)),
            ("upload", self.upload, get_args(NumberFormat)),
        ):
            _require(value in allowed, name, f"one of {', '.join(allowed)}", value)
        smoothing = self.importance_smoothing
        decays = _is_finite(smoothing) and 0 <= smoothing < 1
        _require(decays, "importance_smoothing", "in [0, 1)", smoothing)
        for name, number, least in (
            ("probe_batches", self.probe_batches, 0),
            ("local_epochs", self.local_epochs, 1),
            ("max_steps", self.max_steps, 0),
        ):
            _require(_is_whole(number, least), name, f"a whole number from {least}", number)
        feedback = isinstance(self.error_feedback, bool)
        _require(feedback, "error_feedback", "true or false", self.error_feedback)
        rounds = self.upload not in ("fp32", "sparse") or not self.error_feedback
        _require(rounds, "error_feedback", f"false with upload={self.upload}", self.error_feedback)
        near = _is_finite(self.proximal) and self.proximal >= 0
        _require(near, "proximal", "at least 0 and finite", self.proximal)
        tau = self.logit_adjustment
        adjusts = tau is None or (_is_finite(tau) and tau >= 0)
        _require(adjusts, "logit_adjustment", "null, or at least 0 and finite", tau)
        rated = bool(self.rates) and all(_is_finite(r) and 0 < r <= 1 for r in self.rates)
        _require(rated, "rates", "at least one, each in (0, 1]", shorten(str(self.rates), 80))
        for name, module in self.modules.items():
            self._check_bits_of(name, module)
            if (module.budget is None) != (self.choice is None):
                raise ValueError(f"module {name!r}: a budget goes with a choice, and only with one")
            if module.core is not None:
                self._check_core_of(name)
        share = _is_finite(self.density) and 0 < self.density <= 1
        sparse = (self.density < 1) == (self.upload == "sparse") if share else False
        _require(sparse, "density", "in (0, 1) with upload=sparse, else 1", self.density)
        plain = self.tail is None and self.importance == "none"
        plain = plain and self.upload not in ("mixed", "sparse")
        _require(self.choice is None or plain, "choice", "null with such a plan", self.choice)
        if self.align is not None:
            self._check_alignment()
        if self.own_weight is not None:
            whole = self.choice is None and all(m.is_whole for m in self.modules.values())
            whole = whole and (self.tail is None or not self.tail.prune)
            _require(whole, "own_weight", "null with such a plan", self.own_weight)

    def _check_bits_of(self, name: str, module: ModulePlan) -> None:
        expected = len(module.trainable) if self.upload == "mixed" else 0
        if len(module.bits) != expected:
            raise ValueError(
                f"module {name!r}: bits of {len(module.bits)} components, expected {expected} "
                f"with upload={self.upload}"
            )

    def _check_core_of(self, name: str) -> None:
        plain = self.tail is None and self.importance == "none" and self.align is None
        if not plain or self.upload in ("mixed", "sparse"):
            raise ValueError(f"module {name!r}: a core goes with no such plan, its columns are one")

    def _check_alignment(self) -> None:
        plain = self.tail is None and self.importance == "none" and self.choice is None
        plain = plain and self.upload not in ("mixed", "sparse")
        _require(plain, "align", "null with such a plan", self.align)
        for name, module in self.modules.items():
            first = module.held == module.trainable == tuple(range(len(module.held)))
            if not first or module.own_lora_B:
                raise ValueError(
                    f"module {name!r}: align needs the first components, all trained, none kept"
                )

    @property
    def sends_head(self) -> bool:
        """Whether the head travels to the client."""
        return self.head in ("averaged", "sent")

    @property
    def trains_head(self) -> bool:
        """Whether the client trains a head, whoever keeps it."""
        return self.head in ("averaged", "local")

    @property
    def uploads_head(self) -> bool:
        """Whether the head travels back, trained."""
        return self.head == "averaged"

    @property
    def uploaded_factors(self) -> dict[str, TrainedFactors]:
        """Module name to the factors that are trained and uploaded."""
        return {name: module.uploads for name, module in self.modules.items()}

    def training_everything(self) -> "TrainPlan":
        """Return the plan with every held component trainable; nothing of it is uploaded."""
        modules = {
            n: replace(m, trainable=m.held, bits=(), budget=None) for n, m in self.modules.items()
        }
        plain: dict[str, Any] = {"upload": "fp32", "error_feedback": False, "density": 1.0}
        return replace(self, modules=modules, choice=None, **plain)

    def without_choice(self) -> "TrainPlan":
        """Return the plan under which the client trains and uploads all that it could choose."""
        modules = {name: replace(module, budget=None) for name, module in self.modules.items()}
        return replace(self, modules=modules, choice=None)

    def chosen(self, components: Mapping[str, tuple[int, ...]]) -> "TrainPlan":
        """Return the plan after the client's choice: it trains these, and nothing else.

        Parameters
        ----------
        components
            Module name to the chosen components, in the order of ``trainable``.

        Raises
        ------
        ValueError
            If the plan's rule cannot have chosen them, or it has none.
        """
        if self.choice is None:
            raise ValueError("components are named, and the plan leaves no choice")
        if odd := sorted(components.keys() ^ self.modules.keys()):
            raise ValueError(f"a choice without, or beyond, module {odd[0]!r}")
        candidates = {name: module.trainable for name, module in self.modules.items()}
        budgets = {name: module.num_trained for name, module in self.modules.items()}
        self.choice.check(components, candidates, budgets)
        modules = {
            name: replace(module, trainable=components[name], budget=len(components[name]))
            for name, module in self.modules.items()
        }
        return replace(self, modules=modules)

    def held_numbers(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Return how many numbers of factors the client is sent for these modules.

        Parameters
        ----------
        shapes
            Module name to ``(out_features, in_features)``.
        """
        modules = ((self.modules[name], shape) for name, shape in shapes.items())
        return sum(len(module.held) * sum(module.held_sides(shape)) for module, shape in modules)

    def upload_bytes(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Return the bytes of an upload's factors, with ``mixed`` also of their scales.

        Where the client chooses over the whole model, the most that they can be.

        Parameters
        ----------
        shapes
            Module name to ``(out_features, in_features)``.
        """
        sides = {name: m.uploaded_sides(shapes[name]) for name, m in self.modules.items()}
        if self.upload == "mixed":
            each = (component_bytes(b, *sides[n]) for n, m in self.modules.items() for b in m.bits)
            return sum(each)
        counts = self._largest_counts({name: sum(both) for name, both in sides.items()})
        numbers = sum(count * sum(sides[name]) for name, count in counts.items())
        return self._bytes_of(numbers, self.upload)

    def kept_numbers(self, numbers: int) -> int:
        """Return how many of so many numbers travel: the share ``density``, and at least one."""
        return numbers if self.density == 1 else min(numbers, max(1, floor(self.density * numbers)))

    def held_bytes(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Return the bytes of the factors that the client is sent, see `held_numbers`."""
        return self._bytes_of(self.held_numbers(shapes), "fp32")

    def _bytes_of(self, numbers: int, numbers_in: NumberFormat) -> int:
        mask = 0 if self.density == 1 else -(-numbers // 8)
        return mask + NUMBER_BYTES[numbers_in] * self.kept_numbers(numbers)

    def _largest_counts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return how many components of each module are trained in the largest upload."""
        counts = {name: module.num_trained for name, module in self.modules.items()}
        if self.choice is None or self.choice.scope == "module":
            return counts
        left = sum(counts.values())
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            counts[name] = min(left, len(self.modules[name].trainable))
            left -= counts[name]
        return counts

    def to_json(self) -> str:
        """Write the plan for the wire; modules with equal plans share one entry."""
        groups: dict[ModulePlan, list[str]] = {}
        for name, module in self.modules.items():
            groups.setdefault(module, []).append(name)
        values = {k: v for k, v in asdict(self).items() if k != "modules"}
        # What most plans do not have is left out: they do not grow by it.
        for name, usual in _RARE_OF_PLANS.items():
            if values[name] == usual:
                del values[name]
        values["modules"] = [_module_entry(module, names) for module, names in groups.items()]
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "TrainPlan":
        """Read a plan written by `to_json`.

        Raises
        ------
        ValueError
            If ``text`` is not a plan: a key missing or unknown, or a value out of its range.
        """
        try:
            values = json.loads(text)
            values = _with_keys_of(cls, {**_RARE_OF_PLANS, **values})
            tail, choice, align = values["tail"], values["choice"], values["align"]
            own_weight = values["own_weight"]
            values["modules"] = _read_modules(values["modules"])
            values["rates"] = tuple(values["rates"])
            if tail is not None:
                values["tail"] = TailPruning(**_with_keys_of(TailPruning, tail))
            if choice is not None:
                values["choice"] = ComponentChoice(**_with_keys_of(ComponentChoice, choice))
            if align is not None:
                values["align"] = Alignment(**_with_keys_of(Alignment, align))
            if own_weight is not None:
                values["own_weight"] = OwnWeight(**_with_keys_of(OwnWeight, own_weight))
            return cls(**values)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a train plan: {shorten(str(error), 300)}") from error


def _with_keys_of(kind: type[Any], values: Any) -> dict[str, Any]:
    """Return ``values`` if it names exactly the fields of a dataclass: none has a default here."""
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is {type(values).__name__}, expected an object")
    if odd := sorted({field.name for field in fields(kind)} ^ set(values)):
        raise ValueError(f"{kind.__name__}: keys missing or unknown: {odd}")
    return values


_RARE_OF_PLANS: Mapping[str, Any] = {
    "choice": None,
    "density": 1.0,
    "align": None,
    "proximal": 0.0,
    "logit_adjustment": None,
    "own_weight": None,
    "rates": (1.0,),
}
"""What few plans have, by name, with what it is for all others."""

_RARE: Mapping[str, Any] = {"budget": None, "gain": 1.0, "own_lora_B": False, "core": None}
"""What few modules' plans have, by name, with what it is for all others."""


def _module_entry(module: ModulePlan, names: list[str]) -> list[Any]:
    """Write modules of one plan: three values, the names, and what few plans have."""
    entry: list[Any] = [format_indices(module.held), format_indices(module.trainable)]
    entry += [module.scaling, names]
    if module.bits:
        entry.append(format_bits(module.bits))
    if module.factors != "both":
        entry.append(module.factors)
    if rare := {name: v for name, v in _rare(module).items() if v != _RARE[name]}:
        entry.append(rare)
    return entry


def _rare(module: ModulePlan) -> dict[str, Any]:
    values = {name: getattr(module, name) for name in _RARE}
    return values if module.core is None else values | {"core": asdict(module.core)}


def _read_modules(entries: Any) -> dict[str, ModulePlan]:
    modules: dict[str, ModulePlan] = {}
    for held, trainable, scaling, names, *rest in entries:
        plan = ModulePlan(
            parse_indices(held), parse_indices(trainable), scaling, **_read_rest(rest)
        )
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"module names {names!r}, expected a list of text")
        for name in names:
            if name in modules:
                raise ValueError(f"module {name!r} occurs twice")
            modules[name] = plan
    return modules


def _read_rest(rest: list[Any]) -> dict[str, Any]:
    """Read what is optional behind a module's names: bits, not empty, then a factor, then more."""
    values: dict[str, Any] = {}
    if rest and isinstance(rest[-1], dict):
        *rest, more = rest
        if not more or more.keys() - _RARE.keys():
            expected = ", ".join(_RARE)
            raise TypeError(
                f"behind module names {shorten(repr(more), 80)}, expected some of {expected}"
            )
        values |= more
        if (core := more.get("core")) is not None:
            values["core"] = Core(**_with_keys_of(Core, core))
    if rest and rest[-1] in ("A", "B"):
        *rest, values["factors"] = rest
    if rest:
        if len(rest) > 1 or not isinstance(rest[0], str) or not rest[0]:
            raise TypeError(
                f"behind module names {shorten(repr(rest), 80)}, expected bits, then A or B, or "
                "nothing"
            )
        values["bits"] = parse_bits(rest[0])
    return values
