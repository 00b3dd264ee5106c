"""Locate the files of a base model.

Without torch and transformers: a model that is not there is reported before they are imported.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from hafl_app.training.settings import BaseSpec

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]


class ModelError(ValueError):
    """A base model that is not there, or not the one that was asked for."""


def locate(spec: BaseSpec) -> Path:
    """Return the folder with the model's files: local, hub cache, installed package, hub.

    Raises
    ------
    ModelError
        If none of them has the files, or if they are not the ones of ``spec.sha256``.
    """
    folder = _local(spec) or _cached(spec) or _packaged(spec) or _downloaded(spec)
    if spec.sha256 is not None:
        _check_sha256(folder / "model.safetensors", spec.sha256)
    return folder


def present(spec: BaseSpec) -> Path | None:
    """Return the folder with the model's files if this machine has them, whatever they hash to."""
    try:
        return _local(spec) or _cached(spec) or _packaged(spec)
    except ModelError:
        return None


def _local(spec: BaseSpec) -> Path | None:
    if not spec.path:
        raise ModelError("model.path must be given: a hub name or a local folder")
    folder = Path(spec.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path={spec.path}: the folder has no config.json")
        return folder
    if folder.is_absolute() or spec.path.startswith("."):
        raise ModelError(f"model.path={spec.path}: no such folder")
    return None


def _cached(spec: BaseSpec) -> Path | None:
    try:
        folder = Path(
            snapshot_download(
                spec.path,
                revision=spec.revision,
                allow_patterns=_patterns(spec),
                local_files_only=True,
            )
        )
    except (LocalEntryNotFoundError, ValueError):
        return None
    return folder if (folder / "model.safetensors").exists() else None


def _patterns(spec: BaseSpec) -> list[str]:
    return [*_PATTERNS, "*.py"] if spec.trust_remote_code else _PATTERNS


def _packaged(spec: BaseSpec) -> Path | None:
    if spec.package_path is None:
        return None
    package, _, inside = spec.package_path.partition("/")
    # A dotted name would import its parents, and these would lead out of the package.
    if not package.isidentifier() or Path(inside).is_absolute() or ".." in Path(inside).parts:
        raise ModelError(f"model.package_path={spec.package_path}: expected package/folder")
    # find_spec does not run the package: these packages import far more than their files need.
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / inside


def _downloaded(spec: BaseSpec) -> Path:
    try:
        return Path(
            snapshot_download(spec.path, revision=spec.revision, allow_patterns=_patterns(spec))
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        packaged = f", nor in the package {spec.package_path}" if spec.package_path else ""
        raise ModelError(
            f"model.path={spec.path} is no local folder, not in the hub's cache{packaged}, and "
            f"cannot be downloaded ({type(error).__name__}): give a folder, or go online"
        ) from error


@functools.cache
def _check_sha256(file: Path, expected: str) -> None:
    if not file.is_file():
        # Not the folder: on a node this reason goes to the server.
        raise ModelError(f"the base model has no {file.name}, whose SHA-256 should be {expected}")
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ModelError(
            f"{file.name} of the base model has SHA-256 {digest.hexdigest()}, expected {expected}"
        )
