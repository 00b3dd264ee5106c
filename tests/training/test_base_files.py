"""A base model whose files change is noticed, by samples of its weights."""

import json
import os

import pytest

from hafl_app.training.base_files import BaseFiles
from hafl_app.training.settings import BaseSpec


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model.safetensors").write_bytes(os.urandom(5_000_003))
    return tmp_path


def fingerprint(folder):
    return BaseFiles(BaseSpec(path=str(folder))).fingerprint()


class TestFingerprint:
    def test_stays_when_files_are_only_touched(self, folder):
        before = fingerprint(folder)
        os.utime(folder / "model.safetensors", (1, 1))
        assert before == fingerprint(folder) != ""

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_differs_when_a_file_does(self, folder, name):
        files = BaseFiles(BaseSpec(path=str(folder)))
        before = files.fingerprint()
        (folder / name).write_bytes(os.urandom((folder / name).stat().st_size))
        assert files.fingerprint() != before

    def test_the_last_bytes_of_a_large_file_count(self, folder):
        before = fingerprint(folder)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        assert fingerprint(folder) != before

    def test_is_empty_without_files(self, tmp_path):
        assert BaseFiles(BaseSpec(random_weights=True)).fingerprint() == ""
        assert fingerprint(tmp_path / "none") == ""
