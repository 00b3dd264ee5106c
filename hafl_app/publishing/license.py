"""The license of a base model, as its own card states it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
from huggingface_hub import ModelCard, hf_hub_download
from yaml import YAMLError

from hafl_app.training.locate import present
from hafl_app.training.settings import BaseSpec


def base_license(base: BaseSpec, *, ask_hub: bool) -> str | None:
    """Return the hub's identifier of the license, for example ``apache-2.0``; `None` if not known.

    Looked at are the cards in the base model's folder, on the hub, and in an installed package.

    Parameters
    ----------
    ask_hub
        Download the card if it is not in the cache; what goes wrong then is the same as no card.
    """
    for readme in _cards(base, ask_hub):
        try:
            license_id = ModelCard.load(readme).data.license
        except (OSError, ValueError, YAMLError):
            continue
        if isinstance(license_id, str):
            return license_id
    return None


def _cards(base: BaseSpec, ask_hub: bool) -> Iterator[Path]:
    if not base.path:
        return
    folder = Path(base.path).expanduser()
    if folder.is_dir():
        yield folder / "README.md"
        return
    with contextlib.suppress(OSError, ValueError, httpx.HTTPError):  # not there, or no way to it
        yield Path(
            hf_hub_download(
                base.path, "README.md", revision=base.revision, local_files_only=not ask_hub
            )
        )
    # Not `locate`: it would fetch the weights for this.
    if base.package_path and (packaged := present(base)) is not None:
        yield packaged / "README.md"
