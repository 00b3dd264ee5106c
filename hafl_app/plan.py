"""TrainPlan: what the server asks one client to do in one round.

The strategy writes the plan, the client executes it; a client knows no method names. Standard
library only, because every other room reads it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import floor
from textwrap import shorten
from typing import Any, Literal, get_args

from hafl_app.plan_parts.alignment import Alignment
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.json_values import module_entries, read_modules, read_part, with_keys_of
from hafl_app.plan_parts.module_plan import ModulePlan, TrainedFactors
from hafl_app.plan_parts.number_formats import NUMBER_BYTES, NumberFormat, component_bytes
from hafl_app.plan_parts.own_weight import OwnWeight
from hafl_app.plan_parts.ranges import is_finite, is_whole, require
from hafl_app.plan_parts.tail_pruning import TailPruning

HeadPolicy = Literal["averaged", "frozen", "local", "sent"]
ImportanceMeasure = Literal["none", "sensitivity", "smoothed", "adalora"]

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

_PARTS: Mapping[str, type[Any]] = {
    "tail": TailPruning,
    "choice": ComponentChoice,
    "align": Alignment,
    "own_weight": OwnWeight,
}
"""What a plan may have beside its modules, by name."""


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
            require(value in allowed, name, f"one of {', '.join(allowed)}", value)
        smoothing = self.importance_smoothing
        decays = is_finite(smoothing) and 0 <= smoothing < 1
        require(decays, "importance_smoothing", "in [0, 1)", smoothing)
        for name, number, least in (
            ("probe_batches", self.probe_batches, 0),
            ("local_epochs", self.local_epochs, 1),
            ("max_steps", self.max_steps, 0),
        ):
            require(is_whole(number, least), name, f"a whole number from {least}", number)
        feedback = isinstance(self.error_feedback, bool)
        require(feedback, "error_feedback", "true or false", self.error_feedback)
        rounds = self.upload not in ("fp32", "sparse") or not self.error_feedback
        require(rounds, "error_feedback", f"false with upload={self.upload}", self.error_feedback)
        near = is_finite(self.proximal) and self.proximal >= 0
        require(near, "proximal", "at least 0 and finite", self.proximal)
        tau = self.logit_adjustment
        adjusts = tau is None or (is_finite(tau) and tau >= 0)
        require(adjusts, "logit_adjustment", "null, or at least 0 and finite", tau)
        rated = bool(self.rates) and all(is_finite(r) and 0 < r <= 1 for r in self.rates)
        require(rated, "rates", "at least one, each in (0, 1]", shorten(str(self.rates), 80))
        for name, module in self.modules.items():
            self._check_bits_of(name, module)
            if (module.budget is None) != (self.choice is None):
                raise ValueError(f"module {name!r}: a budget goes with a choice, and only with one")
            if module.core is not None:
                self._check_core_of(name)
        share = is_finite(self.density) and 0 < self.density <= 1
        sparse = (self.density < 1) == (self.upload == "sparse") if share else False
        require(sparse, "density", "in (0, 1) with upload=sparse, else 1", self.density)
        plain = self.tail is None and self.importance == "none"
        plain = plain and self.upload not in ("mixed", "sparse")
        require(self.choice is None or plain, "choice", "null with such a plan", self.choice)
        if self.align is not None:
            self._check_alignment()
        if self.own_weight is not None:
            whole = self.choice is None and all(m.is_whole for m in self.modules.values())
            whole = whole and (self.tail is None or not self.tail.prune)
            require(whole, "own_weight", "null with such a plan", self.own_weight)

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
        require(plain, "align", "null with such a plan", self.align)
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
        values = {k: v for k, v in asdict(self).items() if k != "modules"}
        # What most plans do not have is left out: they do not grow by it.
        for name, usual in _RARE_OF_PLANS.items():
            if values[name] == usual:
                del values[name]
        values["modules"] = module_entries(self.modules)
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
            values = with_keys_of(cls, {**_RARE_OF_PLANS, **values})
            values["modules"] = read_modules(values["modules"])
            values["rates"] = tuple(values["rates"])
            for name, part in _PARTS.items():
                values[name] = read_part(part, values[name])
            return cls(**values)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a train plan: {shorten(str(error), 300)}") from error
