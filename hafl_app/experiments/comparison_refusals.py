"""Comparisons that are refused in one line, and what of their settings has no effect."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from hafl_app.config.schema import Settings
from hafl_app.printable import printable
from hafl_app.run.effects import without_effect

if TYPE_CHECKING:
    from hafl_app.experiments.comparison import Comparison

LEARNING_RATE: Final = "client.learning_rate"
RATIO: Final = "client.lora_B_lr_ratio"
NO_ROUNDS: Final = "federation.num_rounds=0"
_BY_THE_SEARCH: Final = "the tuning (tune=false leaves it out)"
_BY_THE_COMPARISON: Final[Mapping[str, str]] = {
    "seed": "seeds=",
    "output_dir": "output_dir= of the comparison",
    "engine": "the comparison, whose runs are in process",
    "resume": "the comparison, which goes on where it stopped",
    "experiment": "experiment= of the comparison",
}


def key_of(override: str) -> str:
    """Return the key that an override sets."""
    return override.partition("=")[0].lstrip("+~")


def refusals(comparison: "Comparison") -> Iterator[str]:
    """Yield a line for every part that another part of the comparison contradicts."""
    yield from _references(comparison)
    yield from _own_settings(comparison)
    if comparison.command.tune:
        yield from _grid(comparison)
    if comparison.searches:
        tuning = comparison.plan.tuning
        if tuning.seed in comparison.command.seeds:
            yield f"seeds: {tuning.seed} is the seed of the tuning, see compare.tuning.seed"
        yield from _searched_settings(comparison)
    given = set(map(key_of, comparison.command.overrides))
    for key, owner in _owned(comparison):
        if key in given:
            yield f"{key}: set by {owner}, so it cannot be given for all runs"


def ignored(
    comparison: "Comparison", runs: Mapping[tuple[str, str, int], Settings]
) -> Iterator[str]:
    """Yield a line for what was typed for the comparison and changes nothing.

    Parameters
    ----------
    runs
        Settings by cell, method and seed.
    """
    command = comparison.command
    yield from without_effect([*runs.values()], command.overrides, compared=True)
    for name, method in comparison.methods.items():
        its = [settings for (_, of, _), settings in runs.items() if of == name]
        yield from (f"{name}: {line}" for line in without_effect(its, method.overrides))
    for override in command.overrides:
        part, _, rest = key_of(override).removeprefix("compare.").partition(".")
        if part == "methods" and (name := rest.partition(".")[0]) not in comparison.methods:
            yield f"{override} has no effect: {name} is not among the methods compared"
        if part == "tuning" and not comparison.searches:
            why = "nothing is searched" if command.tune else "tune=false"
            yield f"{override} has no effect: {why}"


def _references(comparison: "Comparison") -> Iterator[str]:
    known = comparison.plan.methods
    for name, method in comparison.methods.items():
        reference = method.equal_mean_bytes
        if reference and (reference not in known or known[reference].equal_mean_bytes):
            yield (
                f"compare.methods.{name}.equal_mean_bytes={reference}: no method with ranks of "
                "its own"
            )


def _own_settings(comparison: "Comparison") -> Iterator[str]:
    """Find settings of a cell or a method that are not its to decide, or come twice."""
    parts = {
        **{f"the cell {name}": overrides for name, overrides in comparison.cells.items()},
        **{f"the method {n}": method.overrides for n, method in comparison.methods.items()},
    }
    for part, overrides in parts.items():
        keys = [key_of(override) for override in overrides]
        for key, override in zip(keys, overrides, strict=True):
            if key in _BY_THE_COMPARISON:
                yield f"{override} of {part}: set by {_BY_THE_COMPARISON[key]}"
            if keys.count(key) > 1:
                yield f"{override} of {part}: {key} comes twice"


def _grid(comparison: "Comparison") -> Iterator[str]:
    tuning = comparison.plan.tuning
    grids = {"learning_rates": tuning.learning_rates, "lora_B_lr_ratios": tuning.lora_B_lr_ratios}
    for name, values in grids.items():
        if twice := [value for value in values if values.count(value) > 1]:
            yield f"compare.tuning.{name}={printable(values)}: {twice[0]:g} comes twice"
    if tuning.lora_B_lr_ratios and not tuning.learning_rates:
        yield (
            f"compare.tuning.lora_B_lr_ratios={printable(tuning.lora_B_lr_ratios)}: without rates "
            "nothing is searched; expected compare.tuning.learning_rates too, as in [1e-3,1e-2]"
        )


def _searched_settings(comparison: "Comparison") -> Iterator[str]:
    """Find rates that a search would replace: in a method's settings, or typed for it."""
    rates = {LEARNING_RATE: "learning_rate"}
    if comparison.plan.tuning.lora_B_lr_ratios:
        rates[RATIO] = "lora_B_lr_ratio"
    typed = {key_of(override): override for override in comparison.command.overrides}
    for name, method in comparison.methods.items():
        if NO_ROUNDS in method.overrides:
            continue
        for key, field in rates.items():
            if key in map(key_of, method.overrides):
                yield f"{key} of the method {name}: set by {_BY_THE_SEARCH}"
            if override := typed.get(f"compare.methods.{name}.{field}"):
                yield f"{override}: set by {_BY_THE_SEARCH}"


def _owned(comparison: "Comparison") -> Iterator[tuple[str, str]]:
    """Yield the settings that may not be given for all runs, and what sets them."""
    for name, overrides in comparison.cells.items():
        yield from ((key_of(o), f"the cell {name}") for o in overrides)
    for name, method in comparison.methods.items():
        # A method without rounds has none, however many the others have.
        own: Sequence[str] = [override for override in method.overrides if override != NO_ROUNDS]
        yield from ((key_of(o), f"the method {name}") for o in own)
    if comparison.searches:
        yield LEARNING_RATE, _BY_THE_SEARCH
        if comparison.plan.tuning.lora_B_lr_ratios:
            yield RATIO, _BY_THE_SEARCH
