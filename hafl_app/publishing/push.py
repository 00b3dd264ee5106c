"""Exported folders on the hub, by the user's own token."""

import re
from pathlib import Path
from typing import Final

import httpx
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

_REPOSITORY: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def check_push(repo: str) -> None:
    """Refuse what can be known not to work before anything is exported.

    Raises
    ------
    ValueError
        If ``repo`` is no name of a repository, the hub is switched off, or there is no token.
    """
    if not _REPOSITORY.fullmatch(repo):
        raise ValueError(f"--push {repo}: expected USER/NAME")
    if constants.is_offline_mode():
        raise ValueError(f"--push {repo}: HF_HUB_OFFLINE is set, so nothing goes to the hub")
    if get_token() is None:
        raise ValueError(f"--push {repo}: no token: set HF_TOKEN, or log in with `hf auth login`")


def push_folder(folder: Path, repo: str, *, public: bool) -> str:
    """Upload a folder, and return its address.

    Parameters
    ----------
    repo
        ``USER/NAME``; made if it is not there, private unless ``public``.

    Raises
    ------
    ValueError
        If the repository is public already and ``public`` is not set.
    RuntimeError
        If the hub cannot be reached or refuses.
    """
    api = HfApi(token=get_token())
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise ValueError(
                f"--push {repo}: the repository is public: say --public if you mean it"
            )
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export an adapter")
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"--push {repo}: {reason or type(error).__name__}") from error
    return str(address)
