import pytest

from hafl_app.publishing import output as output_module
from hafl_app.publishing.output import check_output, whole_folder


class TestCheckOutput:
    def test_a_new_or_an_empty_folder_is_fine(self, tmp_path):
        (tmp_path / "empty").mkdir()

        for name in ("new", "empty"):
            check_output(tmp_path / name, tmp_path / "source", force=False)

    def test_a_folder_with_something_is_refused_without_force(self, tmp_path):
        folder = tmp_path / "full"
        folder.mkdir()
        (folder / "file").touch()

        with pytest.raises(ValueError, match=r"full: not empty; --force replaces it"):
            check_output(folder, tmp_path / "source", force=False)
        check_output(folder, tmp_path / "source", force=True)

    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").touch()

        with pytest.raises(ValueError, match="expected a folder"):
            check_output(tmp_path / "file", tmp_path / "source", force=True)

    @pytest.mark.parametrize("inside", [".", "run/adapter"])
    def test_what_holds_the_source_is_refused_even_with_force(self, tmp_path, inside):
        (tmp_path / inside).mkdir(parents=True, exist_ok=True)

        with pytest.raises(ValueError, match="would replace"):
            check_output(tmp_path, tmp_path / inside, force=True)

    def test_what_holds_the_current_folder_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "out" / "deep").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "out" / "deep")

        with pytest.raises(ValueError, match="would replace"):
            check_output(tmp_path / "out", tmp_path / "source", force=True)


class TestWholeFolder:
    def test_appears_when_all_went_well(self, tmp_path):
        with whole_folder(tmp_path / "a" / "out") as scratch:
            (scratch / "file").write_text("new")
            assert not (tmp_path / "a" / "out").exists()

        assert (tmp_path / "a" / "out" / "file").read_text() == "new"
        assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "out"]

    @pytest.mark.parametrize("existed", [True, False])
    def test_a_failure_leaves_what_was_there(self, tmp_path, existed):
        out = tmp_path / "out"
        if existed:
            out.mkdir()
            (out / "old").touch()

        with pytest.raises(OSError, match="disk full"), whole_folder(out) as scratch:
            (scratch / "half").touch()
            raise OSError("disk full")

        assert [p.name for p in tmp_path.rglob("*")] == (["out", "old"] if existed else [])

    def test_replaces_what_was_there(self, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").touch()

        with whole_folder(out) as scratch:
            (scratch / "new").touch()

        assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]

    def test_the_old_one_comes_back_when_the_new_one_cannot_be_moved(self, tmp_path, monkeypatch):
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").touch()
        replace = output_module.Path.replace

        def fails_for_the_new(self, target):
            if (self / "new").exists():
                raise OSError("no")
            return replace(self, target)

        monkeypatch.setattr(output_module.Path, "replace", fails_for_the_new)
        with pytest.raises(OSError, match="no"), whole_folder(out) as scratch:
            (scratch / "new").touch()

        assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]
