from pathlib import Path

import httpx
import pytest

from hafl_app.publishing import license as license_module
from hafl_app.publishing.license import base_license
from hafl_app.training.settings import BaseSpec


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return a hub with one model card; how it was asked is in `hub.asked`."""

    class Hub:
        def __init__(self):
            self.asked, self.error = [], None

        def download(self, repo, file, *, revision, local_files_only):
            self.asked.append((repo, file, revision, local_files_only))
            if self.error:
                raise self.error
            (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
            return str(tmp_path / "README.md")

    hub = Hub()
    monkeypatch.setattr(license_module, "hf_hub_download", hub.download)
    return hub


def test_a_name_on_the_hub(hub):
    found = base_license(BaseSpec("someone/model", revision="abc"), ask_hub=True)

    assert found == "apache-2.0"
    assert hub.asked == [("someone/model", "README.md", "abc", False)]


def test_the_network_is_left_alone_when_asked(hub):
    base_license(BaseSpec("someone/model"), ask_hub=False)

    assert hub.asked == [("someone/model", "README.md", None, True)]


@pytest.mark.parametrize("error", [httpx.ConnectError("no"), OSError("no"), ValueError("no")])
def test_no_way_to_the_hub_is_no_license(hub, error):
    hub.error = error

    assert base_license(BaseSpec("someone/model"), ask_hub=True) is None


def test_the_package_that_carries_the_model_is_asked_as_well(hub, monkeypatch, tmp_path):
    hub.error = OSError("offline")
    (tmp_path / "README.md").write_text("---\nlicense: bsd-2-clause\n---\n")
    monkeypatch.setattr(license_module, "present", lambda base: tmp_path)

    base = BaseSpec("someone/model", package_path="package/model")

    assert base_license(base, ask_hub=False) == "bsd-2-clause"


@pytest.mark.parametrize(
    "card", ["no front matter", "---\nlicense: [a, b]\n---\n", "---\nlicense: [a\n---\n", None]
)
def test_a_folder_whose_card_states_none(hub, tmp_path: Path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)

    assert base_license(BaseSpec(str(tmp_path)), ask_hub=True) is None
    assert hub.asked == []


def test_the_built_in_model_has_none(hub):
    assert base_license(BaseSpec("", random_weights=True), ask_hub=True) is None
    assert hub.asked == []
