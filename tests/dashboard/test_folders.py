"""Nothing outside the root is found or read, whatever a name or a link says."""

import os

import pytest
from run_folders import write_run

from hafl_app.dashboard.folders import FolderError, Root


@pytest.fixture
def root(tmp_path):
    write_run(tmp_path / "outputs" / "day" / "one")
    write_run(tmp_path / "outside")
    return Root(tmp_path / "outputs")


class TestNames:
    def test_runs_are_found_at_any_depth_and_none_in_their_parts(self, root):
        write_run(root.path / "two")
        (root.path / "two" / "adapter").mkdir()
        (root.path / "two" / "adapter" / "summary.json").write_text("{}")
        (root.path / "empty").mkdir()
        assert root.names() == ["day/one", "two"]

    def test_links_are_not_followed(self, root):
        (root.path / "link").symlink_to(root.path.parent / "outside")
        assert root.names() == ["day/one"]

    def test_the_root_may_be_a_run_itself(self, root):
        assert Root(root.path / "day" / "one").names() == ["."]

    def test_a_missing_root_is_refused_in_one_line(self, tmp_path):
        with pytest.raises(FolderError, match=r"/none: no such folder; expected one with runs"):
            Root(tmp_path / "none")


class TestFolder:
    def test_a_run_is_returned(self, root):
        assert root.folder("day/one") == root.path / "day" / "one"

    @pytest.mark.parametrize(
        "name",
        ["../outside", "day/../../outside", "/etc", "{root}/../outside", "day", "x\0", "a" * 5000],
    )
    def test_all_else_is_refused(self, root, name):
        with pytest.raises(FolderError, match="no such run"):
            root.folder(name.format(root=root.path))

    def test_so_is_a_link_that_leads_out(self, root):
        (root.path / "link").symlink_to(root.path.parent / "outside")
        with pytest.raises(FolderError, match="no such run"):
            root.folder("link")


class TestOpen:
    def test_a_file_is_read(self, root):
        with root.open(root.path / "day" / "one" / "config.yaml") as opened:
            assert opened.read(8) == b"dataset:"

    def test_a_link_that_leads_out_is_not(self, root):
        link = root.path / "day" / "one" / "clients.json"
        link.symlink_to(root.path.parent / "outside" / "summary.json")
        with pytest.raises(FolderError, match=r"clients\.json: it leads out of the folder"):
            root.open(link)

    def test_a_pipe_is_not_waited_for(self, root):
        os.mkfifo(root.path / "summary.json")
        with pytest.raises(FolderError, match="not a file"):
            root.open(root.path / "summary.json")

    def test_a_missing_file_is_one_line(self, root):
        with pytest.raises(FolderError, match=r"none\.json: No such file"):
            root.open(root.path / "none.json")
