"""Comparisons whose methods the command line names, without an experiment file."""

import json
from pathlib import Path

import pytest

from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments.command import parse_command
from hafl_app.experiments.compare import compare
from hafl_app.experiments.comparison import Comparison, check_first
from hafl_app.experiments.named_methods import named_methods

TRUNCATION = "hafl:scheme=truncation:ranks=homogeneous:client.learning_rate=1e-2"


def comparison(*arguments):
    return Comparison.of(parse_command(arguments), Path("out"))


def test_a_name_is_a_strategy_and_may_have_settings_of_its_own():
    found = named_methods(["flexlora", TRUNCATION])
    assert [method.overrides for method in found.values()] == [
        ["strategy=flexlora"],
        [
            "strategy=hafl",
            "strategy.scheme=truncation",
            "ranks=homogeneous",
            "client.learning_rate=1e-2",
        ],
    ]
    assert list(found) == ["flexlora", TRUNCATION.replace(":", "-")]


@pytest.mark.parametrize(
    ("methods", "line"),
    [
        ("flexlra", "methods=flexlra: no such strategy; there are .*; did you mean flexlora?"),
        ("fedavg", r"methods=fedavg: no such strategy; did you mean strategy=fedit\?"),
        ("hafl:scheme", "methods=hafl:scheme: scheme is no setting; expected a strategy, or one"),
        ("hafl:", "methods=hafl:: : is no setting"),
        ("hafl:shceme=truncation", "strategy.shceme"),
        ("hafl:scheme=x", "strategy.scheme=x: expected .*freezing or truncation"),
        ("hafl:partition.kind=x/y", "the name .* must match"),
    ],
)
def test_a_wrong_one_is_refused_in_one_line(methods, line):
    with pytest.raises(SettingsError, match=line) as caught:
        found = comparison(f"methods={methods}")
        for cell in found.cells:
            for method in found.methods:
                compose(found.overrides_of(cell, method))
    assert "\n" not in str(caught.value)


def test_runs_have_the_settings_of_the_command_line_and_of_their_method():
    found = comparison(f"methods=hetlora,{TRUNCATION}", "seeds=0,1", "federation.num_rounds=3")
    jobs = found.jobs(found.fixed_rates())
    assert [(job.method.partition("-")[0], job.seed) for job in jobs] == [
        ("hetlora", 0),
        ("hafl", 0),
        ("hetlora", 1),
        ("hafl", 1),
    ]
    settings = [compose(job.overrides) for job in jobs]
    assert {one.federation.num_rounds for one in settings} == {3}
    assert [one.strategy.__class__.__name__ for one in settings[:2]] == ["HetLora", "Hafl"]
    assert settings[1].strategy.scheme == "truncation"
    assert settings[1].client.learning_rate == 1e-2


def test_the_first_is_the_baseline_unless_one_is_named():
    assert comparison("methods=hetlora,hafl").plan.baseline == "hetlora"
    assert comparison("methods=hetlora,hafl", "compare.baseline=hafl").plan.baseline == "hafl"
    with pytest.raises(SettingsError, match="not among the methods"):
        check_first(parse_command(["methods=hetlora", "compare.baseline=hafl"])).require_baseline()


def test_an_experiment_without_methods_takes_named_ones():
    found = comparison("experiment=demo", "methods=hafl,hetlora")
    assert "experiment=demo" in found.overrides_of("", "hafl")
    with pytest.raises(SettingsError, match=r"experiment=demo: it has no compare.methods; give"):
        comparison("experiment=demo")


def test_what_a_method_sets_cannot_be_given_for_all():
    with pytest.raises(SettingsError, match="strategy: set by the method hafl"):
        comparison("methods=hafl,hetlora", "strategy=flexlora")


def test_nothing_to_compare_is_one_line():
    with pytest.raises(SettingsError, match="experiment= or methods= must be given"):
        parse_command(["seeds=0,1"])


@pytest.mark.slow
def test_a_file_of_ones_own_is_compared_without_an_experiment_file(tmp_path):
    rows = (f"the {i % 7} of {i % 3},{'ab'[i % 2]}\n" for i in range(120))
    (tmp_path / "my.csv").write_text("text,label\n" + "".join(rows))
    command = parse_command(
        [
            *("methods=hafl,hetlora", "seeds=0", f"output_dir={tmp_path / 'out'}"),
            *("dataset=local", f"dataset.path={tmp_path / 'my.csv'}", "dataset.max_length=16"),
            *("model=tiny_random", "federation.num_clients=3", "federation.num_rounds=1"),
            *("federation.cohort=1", "tracking=none"),
        ]
    )
    lines = []

    assert compare(command, "the command line", lines.append) == 0

    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["hafl", "hetlora"]
    assert results["title"] == "Comparison of hafl, hetlora"
    assert results["baseline"] == "hafl"
    assert results["tuning"] == "client.learning_rate"
