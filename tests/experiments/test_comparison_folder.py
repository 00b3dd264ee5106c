"""The folder of a comparison: what it may hold, and that one process at a time writes it."""

import json

import pytest
from written_runs import write_run

from hafl_app.config.compose import SettingsError
from hafl_app.experiments.comparison_folder import check_folder, comparison_lock
from hafl_app.run.run_lock import RunLockedError


def refusal(folder, experiment=""):
    before = sorted(folder.parent.iterdir())
    with pytest.raises(SettingsError) as caught:
        check_folder(folder, experiment)
    assert sorted(folder.parent.iterdir()) == before
    return str(caught.value)


def test_new_and_empty_folders_and_those_of_the_same_comparison_are_fine(tmp_path):
    check_folder(tmp_path / "new", "digits")
    check_folder(tmp_path, "digits")
    (tmp_path / "results.json").write_text(json.dumps({"experiment": "digits"}))
    check_folder(tmp_path, "digits")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"title": "of an earlier version"}'])
def test_what_says_nothing_is_written_anew(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    check_folder(tmp_path, "digits")


def test_a_file_is_refused_and_a_folder_below_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert f"output_dir={file}: {file} is a file; expected a folder" in refusal(file)
    with pytest.raises(SettingsError, match=f"{file} is a file"):
        check_folder(file / "below", "")


def test_the_folder_of_a_run_is_refused(tmp_path):
    assert "the folder of a run; expected that of a" in refusal(write_run(tmp_path / "run"))


def test_that_of_another_experiment_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/results.json").write_text(json.dumps({"experiment": "digits"}))
    assert "holds a comparison of experiment=digits; another" in refusal(tmp_path / "a", "demo")
    (tmp_path / "a/results.json").write_text(json.dumps({"experiment": ""}))
    assert "of methods without experiment=" in refusal(tmp_path / "a", "demo")


def test_two_at_once_are_refused_and_it_is_no_folder_of_a_run(tmp_path):
    with comparison_lock(tmp_path):
        assert not (tmp_path / ".lock").exists()
        with (
            pytest.raises(RunLockedError, match="is still running this"),
            comparison_lock(tmp_path),
        ):
            pass
    with comparison_lock(tmp_path):
        pass
