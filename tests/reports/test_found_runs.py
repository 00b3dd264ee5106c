"""Where runs are found: alone, in sweeps, in comparisons."""

import json

import pytest
from written_runs import write_run

from hafl_app.reports import folders
from hafl_app.reports.folders import NoRunError, find_runs


@pytest.fixture
def comparison(tmp_path):
    top = tmp_path / "comparison"
    for method in ("fedit", "hafl"):
        for seed in (0, 1):
            write_run(top / "iid" / method / f"seed{seed}", seed=seed)
    write_run(top / "tuning" / "iid" / "hafl" / "lr0.1")
    (top / "results.json").write_text(json.dumps({"baseline": "fedit", "rows": []}))
    return top


def names(places, top):
    return [str(place.folder.relative_to(top)) for place in places]


def test_a_run_is_found_once_however_often_it_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    assert names(find_runs([run, tmp_path, run]), tmp_path) == ["run"]


def test_jobs_of_a_sweep_come_by_number(tmp_path):
    for number in (0, 1, 2, 10):
        write_run(tmp_path / "sweep" / str(number), seed=number)
    found = find_runs([tmp_path / "sweep"])
    assert names(found, tmp_path / "sweep") == ["0", "1", "2", "10"]
    assert {(place.cell, place.method, place.baseline) for place in found} == {("", "", "")}


def test_a_comparison_has_cells_methods_and_a_baseline_and_its_search_does_not_count(comparison):
    found = find_runs([comparison.parent])
    assert [(p.cell, p.method, p.baseline) for p in found] == [
        *[("iid", "fedit", "fedit")] * 2,
        *[("iid", "hafl", "fedit")] * 2,
    ]


def test_a_run_that_gave_way_does_not_count_unless_it_is_named(comparison):
    before = write_run(comparison / "iid/hafl/seed0-before", test=(0.1, 0.9))
    assert before not in [place.folder for place in find_runs([comparison])]
    assert [place.folder for place in find_runs([before])] == [before]


def test_what_lies_in_a_run_and_hidden_folders_do_not_count(tmp_path):
    run = write_run(tmp_path / "run")
    write_run(run / "adapter")
    write_run(tmp_path / ".hidden")
    assert names(find_runs([tmp_path]), tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("name", "line"), [("nope", "no such folder"), ("empty", "no run in it"), ("file", "no such")]
)
def test_a_folder_without_a_run_is_refused(name, line, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(NoRunError, match=line):
        find_runs([tmp_path / name])


def test_a_whole_disk_is_not_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_MOST_FOLDERS", 3)
    for number in range(5):
        (tmp_path / str(number)).mkdir()
    with pytest.raises(NoRunError, match="more than 3 folders"):
        find_runs([tmp_path])
