from types import SimpleNamespace

import httpx
import pytest

from hafl_app.publishing import push as push_module
from hafl_app.publishing.push import check_push, push_folder


class FakeApi:
    """Stands in for `HfApi`; keeps its arguments in `calls`."""

    def __init__(self, private: bool, error: Exception | None = None) -> None:
        self.private, self.error = private, error
        self.calls = []

    def __call__(self, token):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo, *, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))
        return f"https://huggingface.co/{repo}"

    def model_info(self, repo):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error:
            raise self.error
        self.calls.append(("upload", repo_id, folder_path))


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setattr(push_module, "get_token", lambda: "hf_mine")


def fake(monkeypatch, **settings) -> FakeApi:
    api = FakeApi(**settings)
    monkeypatch.setattr(push_module, "HfApi", api)
    return api


class TestPushFolder:
    def test_is_private_with_the_users_token(self, monkeypatch, tmp_path):
        api = fake(monkeypatch, private=True)

        address = push_folder(tmp_path, "me/adapter", public=False)

        assert address == "https://huggingface.co/me/adapter"
        assert api.calls == [
            ("token", "hf_mine"),
            ("create", "me/adapter", True, True),
            ("upload", "me/adapter", tmp_path),
        ]

    def test_is_public_when_asked(self, monkeypatch, tmp_path):
        api = fake(monkeypatch, private=False)

        push_folder(tmp_path, "me/adapter", public=True)

        assert ("create", "me/adapter", False, True) in api.calls
        assert api.calls[-1][0] == "upload"

    def test_nothing_private_goes_into_a_public_repository(self, monkeypatch, tmp_path):
        api = fake(monkeypatch, private=False)

        with pytest.raises(ValueError, match="me/adapter: the repository is public"):
            push_folder(tmp_path, "me/adapter", public=False)

        assert "upload" not in [call[0] for call in api.calls]

    @pytest.mark.parametrize("error", [httpx.ConnectError("no way\nthere"), OSError("no way")])
    def test_what_the_hub_says_is_one_line(self, monkeypatch, tmp_path, error):
        fake(monkeypatch, private=True, error=error)

        with pytest.raises(RuntimeError, match=r"^--push me/adapter: no way$"):
            push_folder(tmp_path, "me/adapter", public=False)


class TestCheckPush:
    @pytest.fixture(autouse=True)
    def online(self, monkeypatch):
        monkeypatch.setattr(push_module.constants, "HF_HUB_OFFLINE", False)

    def test_a_name_and_a_token_are_enough(self):
        check_push("me/adapter")

    @pytest.mark.parametrize("repo", ["adapter", "me/a/b", "../adapter", "me/", "me/a b"])
    def test_a_name_that_is_none(self, repo):
        with pytest.raises(ValueError, match="expected USER/NAME"):
            check_push(repo)

    def test_without_a_token(self, monkeypatch):
        monkeypatch.setattr(push_module, "get_token", lambda: None)

        with pytest.raises(ValueError, match=r"^--push me/adapter: no token: set HF_TOKEN, or"):
            check_push("me/adapter")

    def test_offline(self, monkeypatch):
        monkeypatch.setattr(push_module.constants, "HF_HUB_OFFLINE", True)

        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
            check_push("me/adapter")
