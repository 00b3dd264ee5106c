"""Plan a comparison: an experiment file and a command line become its runs."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hafl_app.config.compose import SettingsError, compose, quoted
from hafl_app.config.hints import nearest
from hafl_app.config.schema import CompareSettings, MethodSettings, Settings
from hafl_app.experiments.command import Command, choose
from hafl_app.experiments.comparison_refusals import (
    LEARNING_RATE,
    NO_ROUNDS,
    RATIO,
    key_of,
    refusals,
)
from hafl_app.experiments.named_methods import named_methods
from hafl_app.metrics import ACCURACY, TASKS, Metric
from hafl_app.run import preflight
from hafl_app.run.checks import check_comparison

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_NAMES_IN_TITLE = 4
_NOT_IN_A_SEARCH = (
    "federation.alone_clients_per_rank=0",
    "federation.test_every=0",
    "federation.score_device_ranks=false",
    "model.closed_form.per_rank=false",
)


@dataclass(frozen=True)
class Rates:
    """Learning rate, and that of ``lora_B`` over it; None: the method's own ratio."""

    learning_rate: float
    ratio: float | None = None

    def __str__(self) -> str:
        """Return them as in lines of progress: ``0.003``, ``0.003 ratio 5``."""
        return f"{self.learning_rate}" + ("" if self.ratio is None else f" ratio {self.ratio:g}")

    @property
    def overrides(self) -> list[str]:
        """The settings of a run."""
        ratio = [] if self.ratio is None else [f"{RATIO}={self.ratio}"]
        return [f"{LEARNING_RATE}={self.learning_rate}", *ratio]


@dataclass(frozen=True)
class Job:
    """Run of a method in a cell on a seed, as overrides, with the folder of its results.

    `centralized`: it is no federation's, see `hafl_app.experiments.centralized`.
    """

    cell: str
    method: str
    seed: int
    rates: Rates
    overrides: tuple[str, ...]
    folder: Path
    centralized: bool = False

    @property
    def name(self) -> str:
        """Name of the run in a line of progress."""
        return f"{named(self.cell, self.method)} seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """Every chosen method in every chosen cell, on the same seeds.

    The seed alone decides partitions, rank budgets and sampling, so the methods of a cell meet
    the same clients. A comparison without cells has one, with the empty name. Methods are compared
    by ``metric``.
    """

    command: Command
    plan: CompareSettings
    folder: Path
    methods: Mapping[str, MethodSettings]
    cells: Mapping[str, Sequence[str]]
    metric: Metric = ACCURACY

    @classmethod
    def of(cls, command: Command, folder: Path) -> "Comparison":
        """Compose the experiment and check its ``compare`` block.

        Raises
        ------
        SettingsError
            In one line.
        """
        settings = compose(command.common)
        plan = settings.compare
        if not plan.methods:
            command, plan = _with_named_methods(command, plan)
        cells: Mapping[str, Sequence[str]] = plan.cells or {"": []}
        for name in [*plan.methods, *plan.cells]:
            if not _NAME.fullmatch(name):
                raise SettingsError(f"compare: the name {name!r} must match {_NAME.pattern}")
        comparison = cls(
            command,
            plan,
            folder,
            {
                name: plan.methods[name]
                for name in choose("methods", command.methods, [*plan.methods])
            },
            {name: cells[name] for name in choose("cells", command.cells, [*cells])},
            TASKS[settings.model.task].primary,
        )
        for problem in refusals(comparison):
            raise SettingsError(problem)
        check_comparison(settings, comparison.searches)
        return comparison

    @property
    def title(self) -> str:
        """What is compared: the experiment, else the methods."""
        if self.command.experiment:
            return self.command.experiment
        names = list(self.methods)
        many = len(names) > _NAMES_IN_TITLE
        return f"Comparison of {f'{len(names)} methods' if many else ', '.join(names)}"

    def require_baseline(self) -> None:
        """Refuse a choice of methods without the baseline that the others are timed to.

        Raises
        ------
        SettingsError
            In one line.
        """
        if self.plan.baseline not in self.methods:
            raise SettingsError(
                f"compare.baseline={self.plan.baseline}: not among the methods compared; add it, "
                f"or choose {', '.join(self.methods)}{nearest(self.plan.baseline, [*self.methods])}"
            )

    @property
    def searches(self) -> bool:
        """Whether learning rates are searched: there is a grid, and `tune=false` is not set.

        Not for methods that train nothing.
        """
        searches = self.command.tune and bool(self.plan.tuning.learning_rates)
        return searches and any(map(self._trains, self.methods))

    def _trains(self, method: str) -> bool:
        return NO_ROUNDS not in self.plan.methods[method].overrides

    def overrides_of(self, cell: str, method: str, *more: str) -> list[str]:
        """Return the overrides of a run: the command line's, the cell's, then the method's."""
        method_settings = self.plan.methods[method]
        overrides = [*self._common(cell), *method_settings.overrides]
        if method_settings.equal_mean_bytes:
            reference = self.plan.methods[method_settings.equal_mean_bytes].overrides
            overrides.append(f"lora.max_rank={_rank(*self._common(cell), *reference)}")
        return list({key_of(o): o for o in [*overrides, *more]}.values())

    def only(self, method: str) -> "Comparison":
        """Return the part of the comparison that is one method's."""
        return replace(self, methods={method: self.methods[method]})

    def jobs(self, rates: Mapping[tuple[str, str], Rates]) -> list[Job]:
        """Return the runs, those that share data and base model next to each other.

        Parameters
        ----------
        rates
            By cell and method.
        """
        return [
            self._job(cell, method, seed, rates[cell, method], Path(cell) / method)
            for cell in self.cells
            for seed in self.command.seeds
            for method in self.methods
        ]

    def fixed_rates(self) -> dict[tuple[str, str], Rates]:
        """Return each method's rates as the experiment file or the command line has them."""
        return {
            (cell, method): self._fixed(cell, method)
            for cell in self.cells
            for method in self.methods
        }

    def first_rates(self) -> dict[tuple[str, str], Rates]:
        """Return rates to check the runs with: the first of the grid, if there is a search."""
        if not self.searches:
            return self.fixed_rates()
        searched = [(c, m) for c in self.cells for m in filter(self._trains, self.methods)]
        return self.fixed_rates() | dict.fromkeys(searched, self.grid()[0])

    def tuning_cells(self) -> list[str]:
        """Return the cells in which learning rates are searched."""
        return list(self.cells) if self.plan.tuning.per_cell else list(self.cells)[:1]

    def grid(self) -> list[Rates]:
        """Return the rates that a search tries."""
        tuning = self.plan.tuning
        ratios: list[float | None] = [*tuning.lora_B_lr_ratios] or [None]
        return [Rates(rate, ratio) for rate in tuning.learning_rates for ratio in ratios]

    def tuning_jobs(self) -> list[Job]:
        """Return the runs of the search: every method at every rate, on validation data alone."""
        tuning = self.plan.tuning
        extra = [*_NOT_IN_A_SEARCH]
        if tuning.num_rounds is not None:
            extra.append(f"federation.num_rounds={tuning.num_rounds}")
        return [
            self._job(cell, method, tuning.seed, rates, _place(cell, method, rates), extra)
            for cell in self.tuning_cells()
            for method in filter(self._trains, self.methods)
            for rates in self.grid()
        ]

    def _common(self, cell: str) -> tuple[str, ...]:
        return (*self.command.common, *self.cells[cell], "engine=inprocess")

    def _job(
        self,
        cell: str,
        method: str,
        seed: int,
        rates: Rates,
        place: Path,
        extra: Sequence[str] = (),
    ) -> Job:
        folder = self.folder / place if extra else self.folder / place / f"seed{seed}"
        more = [*extra, *rates.overrides, f"seed={seed}", f"output_dir={quoted(folder)}"]
        overrides = self.overrides_of(cell, method, *more)
        centralized = self.methods[method].centralized
        return Job(cell, method, seed, rates, tuple(overrides), folder, centralized)

    def _fixed(self, cell: str, method: str) -> Rates:
        given = set(map(key_of, self.command.overrides))
        its = self.methods[method]
        rate = None if LEARNING_RATE in given else its.learning_rate
        if rate is None:
            overrides = self.overrides_of(cell, method)
            rate = composed(named(cell, method), overrides).client.learning_rate
        return Rates(rate, None if RATIO in given else its.lora_B_lr_ratio)


def check_first(command: Command) -> Comparison:
    """Refuse a command line as far as its faults show without the model and the data.

    Returns
    -------
    Comparison
        Of this command, without a folder.

    Raises
    ------
    ValueError
        In one line.
    """
    comparison = Comparison.of(command, Path())
    preflight.check_first(compose(command.common))
    return comparison


def _with_named_methods(command: Command, plan: CompareSettings) -> tuple[Command, CompareSettings]:
    """Return the command and the plan of a comparison whose methods the command line names.

    The first is the baseline, unless one is given.
    """
    if not command.methods:
        raise SettingsError(
            f"experiment={command.experiment}: it has no compare.methods; give methods=..., such "
            "as methods=hafl,flexlora"
        )
    methods = named_methods(command.methods)
    baseline = plan.baseline or next(iter(methods))
    return replace(command, methods=tuple(methods)), replace(
        plan, methods=methods, baseline=baseline
    )


def _place(cell: str, method: str, rates: Rates) -> Path:
    name = f"lr{rates}".replace(" ratio ", "-ratio")
    return Path("tuning") / cell / method / name


def named(cell: str, method: str) -> str:
    """Name a method in a cell, of a comparison that may have none."""
    return " ".join(filter(None, (cell, method)))


def composed(where: str, overrides: Sequence[str]) -> Settings:
    """Compose the settings of a method in a cell, whose faults are then theirs.

    Raises
    ------
    SettingsError
        In one line that begins with the place.
    """
    try:
        return compose(overrides)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


@functools.cache
def _rank(*overrides: str) -> int:
    # Here, because it loads the model: other comparisons are checked without.
    from hafl_app.experiments.budget import equal_mean_bytes_rank  # noqa: PLC0415

    return equal_mean_bytes_rank(compose(overrides))
