"""Comparisons that are refused in one line, and what is warned of, before anything is written."""

from pathlib import Path

import pytest

from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments.command import parse_command
from hafl_app.experiments.comparison import Comparison
from hafl_app.experiments.comparison_refusals import ignored

NAMED = "methods=hafl,flexlora"
DIGITS = "experiment=digits"
SEARCH = "compare.tuning.learning_rates=[1e-3,1e-2]"


def comparison(*arguments):
    return Comparison.of(parse_command(arguments), Path("out"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([NAMED, "seeds=0", "seeds=1"], "seeds=1: seeds= is given twice, expected once"),
        ([NAMED, "output_dir="], "output_dir=: expected a value, or leave it out"),
        (["methods=hafl, hafl"], "methods=hafl, hafl: hafl comes twice"),
        (["methods=hafl,,fedit"], "expected names, e.g. methods=first,second"),
        (["methods=hafl, ,fedit"], "expected names, e.g. methods=first,second"),
        ([NAMED, "cells=a,a"], "cells=a,a: a comes twice"),
        ([NAMED, "resume=latest"], "resume=latest: resumes one run; a comparison goes on where"),
        (
            [DIGITS, "compare.methods.hetlora.overrides=['engine=ray']"],
            "engine=ray of the method hetlora: set by the comparison, whose runs are in process",
        ),
        (
            [DIGITS, "compare.methods.hetlora.overrides=['output_dir=x']"],
            "output_dir=x of the method hetlora: set by output_dir= of the comparison",
        ),
        (["methods=hafl:scheme=truncation:scheme=freezing"], "strategy.scheme comes twice"),
        (["methods=hafl:strategy=fedit"], "strategy=hafl of the method .*: strategy comes twice"),
        ([DIGITS, "+compare.cells.a=['seed=1']"], "seed=1 of the cell a: set by seeds="),
        (
            [NAMED, "compare.tuning.lora_B_lr_ratios=[1,5]"],
            r"compare.tuning.lora_B_lr_ratios=\[1.0, 5.0\]: without rates nothing is searched",
        ),
        ([NAMED, "compare.tuning.learning_rates=[1e-3,0.001]"], "learning_rates=.*: 0.001 comes"),
        ([NAMED, SEARCH, "compare.tuning.lora_B_lr_ratios=[5,5]"], "5 comes twice"),
        (
            [NAMED, "compare.tuning.learning_rates=[1e-3,0]"],
            r"learning_rates=\[.*\]: must be above",
        ),
        ([NAMED, "compare.tuning.learning_rates=[nan]"], r"learning_rates=\[nan\]: must be above"),
        ([NAMED, "compare.tuning.learning_rates=[high]"], "compare.tuning.learning_rates"),
        ([NAMED, SEARCH, "compare.tuning.seed=0"], "seeds: 0 is the seed of the tuning"),
        (
            ["methods=hafl:client.learning_rate=1e-2,fedit", SEARCH],
            "client.learning_rate of the method hafl-client.*: set by the tuning",
        ),
        (
            [DIGITS, SEARCH, "compare.methods.hetlora.learning_rate=1e-2"],
            "compare.methods.hetlora.learning_rate=1e-2: set by the tuning",
        ),
        ([NAMED, f"compare.tuning.seed={10**19}"], "compare.tuning.seed=.*: must be at most"),
    ],
)
def test_is_refused_in_one_line(arguments, line):
    with pytest.raises(SettingsError, match=line) as caught:
        comparison(*arguments)
    assert "\n" not in str(caught.value)


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(SettingsError, match=r"seed=1000000000000000001: must be at most 10+$"):
        compose([f"seed={10**18 + 1}"])


def test_ratios_of_a_method_stay_where_rates_alone_are_searched():
    found = comparison("methods=hafl:client.lora_B_lr_ratio=5,hafl", SEARCH)
    (tuned, _) = [job for job in found.tuning_jobs() if "ratio" in job.method]
    assert compose(tuned.overrides).client.lora_B_lr_ratio == 5


def ignored_lines(*arguments):
    found = comparison(*arguments)
    jobs = found.jobs(found.first_rates())
    return [*ignored(found, {(j.cell, j.method, j.seed): compose(j.overrides) for j in jobs})]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            [NAMED, "partition.dirichlet_alpha=0.1", "partition=iid"],
            "partition.dirichlet_alpha=0.1",
        ),
        ([NAMED, "federation.num_rounds=1", "federation.num_rounds=2"], "comes after it"),
        (
            ["methods=hafl,fedit:partition.kind=iid:partition.dirichlet_alpha=0.1"],
            "fedit-partition.kind=iid-partition.dirichlet_alpha=0.1: partition.dirichlet_alpha=0.1",
        ),
        (
            [DIGITS, "methods=flexlora", "compare.methods.hetlora.learning_rate=1e-2"],
            "hetlora is not among the methods compared",
        ),
        ([DIGITS, "compare.tuning.num_rounds=2"], "has no effect: nothing is searched"),
        ([NAMED, SEARCH, "tune=false"], "has no effect: tune=false"),
    ],
)
def test_what_was_typed_without_effect_is_named(arguments, line):
    (found,) = ignored_lines(*arguments)
    assert line in found
    assert "has no effect" in found


def test_what_has_an_effect_is_not_named():
    given = ("federation.num_rounds=1", SEARCH, "compare.tuning.num_rounds=1")
    assert ignored_lines("methods=hafl:scheme=truncation,hafl", *given) == []
    assert ignored_lines(DIGITS, "compare.methods.hetlora.learning_rate=1e-2") == []
