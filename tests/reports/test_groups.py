"""Runs gathered by what they differ in."""

from pathlib import Path

import pytest
from written_runs import write_run

from hafl_app.reports.folders import Place
from hafl_app.reports.groups import differing, sections_of
from hafl_app.reports.runs import flattened, read_run


@pytest.fixture
def read(tmp_path):
    """Return a function that writes runs, each of some keywords, and reads them."""

    def make(*runs):
        found = []
        for number, keywords in enumerate(runs):
            folder = write_run(tmp_path / str(number), **keywords)
            found.append((Place(folder), read_run(folder)))
        return found

    return make


def names(section):
    return [(group.name, sorted(group.runs)) for group in section.groups]


def test_seeds_are_gathered_and_settings_tell_groups_apart(read):
    runs = [
        {"seed": seed, "client": {"learning_rate": rate, "batch_size": 8}}
        for rate in (0.01, 0.001)
        for seed in (0, 1, 2)
    ]
    (section,) = sections_of(read(*runs))
    assert names(section) == [("learning_rate=0.01", [0, 1, 2]), ("learning_rate=0.001", [0, 1, 2])]
    assert section.baseline == "learning_rate=0.01"


def test_methods_are_told_apart_by_name_alone(read):
    found = read({"strategy": "hafl"}, {"strategy": "hetlora"})
    # HetLoRA's decay is no setting of HAFL's: it does not tell runs apart.
    (section,) = sections_of(found)
    assert names(section) == [("hafl", [0]), ("hetlora", [0])]


def test_a_methods_own_setting_counts_among_its_runs():
    hafl = {"strategy._target_": "hafl_app.strategies.hafl.Hafl"}
    hetlora = {"strategy._target_": "hafl_app.strategies.hetlora.HetLora"}
    assert differing([hafl | {"strategy.scheme": "freezing"}, hetlora]) == ["strategy"]
    both = [hafl | {"strategy.scheme": "freezing"}, hafl | {"strategy.scheme": "truncation"}]
    assert differing([*both, hetlora]) == ["strategy", "strategy.scheme"]


def test_folder_seed_and_tracking_are_no_differences():
    settings = {"seed": 1, "output_dir": "a", "resume": None, "tracking.kind": "wandb", "name": "x"}
    assert differing([settings, settings | dict.fromkeys(settings, "other")]) == []


def test_one_metric_a_section(read):
    found = read({}, {"metric": "perplexity"}, {"strategy": "hafl"})
    sections = sections_of(found)
    assert [(section.title, len(section.groups)) for section in sections] == [
        ("accuracy", 2),
        ("perplexity", 1),
    ]


def test_two_runs_of_one_seed_are_said(read):
    (section,) = sections_of(read({}, {}))
    (note,) = section.notes
    assert "two runs with seed 0" in note


def test_the_baseline_may_be_named(read):
    found = read({"strategy": "hafl"}, {"strategy": "flexlora"})
    (section,) = sections_of(found, "flexlora")
    assert section.baseline == "flexlora"
    with pytest.raises(ValueError, match="there are hafl, flexlora; did you mean 'flexlora'"):
        sections_of(found, "flexlor")


def test_settings_of_lists_are_words():
    tiers = [{"rank": 2, "share": 16.0, "pattern": {}}, {"rank": 4, "share": 0.5, "pattern": {}}]
    assert flattened({"ranks": {"tiers": tiers, "names": ["a", "b"]}}) == {
        "ranks.tiers": "rank 2 share 16; rank 4 share 0.5",
        "ranks.names": "a, b",
    }


def test_groups_that_look_alike_are_numbered(read):
    # They differ in more settings than a name holds.
    runs = [dict(zip("abcd", ({"x": n} for n in values), strict=True)) for values in (
        (1, 1, 1, 1), (1, 1, 1, 2), (2, 2, 2, 1),
    )]  # fmt: skip
    (section,) = sections_of(read(*runs))
    found = [group.name for group in section.groups]
    assert found == ["x=1, x=1, x=1 (1)", "x=1, x=1, x=1 (2)", "x=2, x=2, x=2"]


def test_a_group_without_a_score_has_no_seed_that_counts(tmp_path):
    folder = write_run(Path(tmp_path) / "run", (0.1, float("nan")))
    (section,) = sections_of([(Place(folder), read_run(folder))])
    assert section.groups[0].finals == {}
