"""Locate the files of a base model.

Without torch and transformers: a model that is not there is reported before they are imported.
"""

import importlib.util
import json
import logging
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from hafl_app.packages import install_command
from hafl_app.training import gguf_base
from hafl_app.training.gguf_base import origin_of
from hafl_app.training.settings import BaseSpec
from hafl_app.training.weights_file import ModelError, check_sha256

__all__ = [
    "ModelError",
    "locate",
    "locate_without_weights",
    "present",
    "unread_gguf",
    "weights_note",
]

_LOGGER = logging.getLogger(__name__)
_WEIGHTS = "*.safetensors"
_PATTERNS = ["*.json", "*.jinja", _WEIGHTS, "*.txt", "*.model"]


def locate(spec: BaseSpec) -> Path:
    """Return the folder with the model's files: local, hub cache, installed package, hub.

    A package's GGUF file that was not read yet comes after the hub, whose weights are whole. It is
    then read into a folder once, in some twenty seconds, and that comes before the hub.

    Raises
    ------
    ModelError
        If none of them has the files, or if they are not the ones of ``spec.sha256``.
    """
    folder = _local(spec) or _cached(spec) or _packaged(spec) or _downloaded(spec)
    if spec.sha256 is not None and origin_of(folder) is None:
        check_sha256(folder / "model.safetensors", spec.sha256)
    return folder


def locate_without_weights(spec: BaseSpec) -> Path:
    """Return a folder with the model's configuration and tokenizer, as `locate` finds it.

    Its weights may be missing: from the hub they are not downloaded for this. A server that
    evaluates nothing needs no more.

    Raises
    ------
    ModelError
        If there is no such folder.
    """
    return _local(spec) or _cached(spec) or _packaged(spec) or _downloaded(spec, weights=False)


def present(spec: BaseSpec) -> Path | None:
    """Return the folder with the model's files if this machine has them, whatever they hash to."""
    try:
        return _local(spec) or _cached(spec) or _packaged(spec)
    except ModelError:
        return None


def unread_gguf(spec: BaseSpec) -> Path | None:
    """Return the GGUF file that `locate` would read where the hub cannot be reached.

    Raises
    ------
    ModelError
        If its bytes are not those of ``spec.package_sha256``, or the package that reads it is
        missing.
    """
    return None if present(spec) is not None else _readable_gguf(spec)


def _readable_gguf(spec: BaseSpec) -> Path | None:
    if (file := _in_package(spec)) is None or file.suffix != gguf_base.SUFFIX:
        return None
    gguf_base.require_reader(file)
    return file


def weights_note(spec: BaseSpec) -> str | None:
    """Say what this machine's weights of a model were read from; None if they are its own files."""
    if spec.is_without_files or spec.random_weights or (folder := present(spec)) is None:
        return None
    origin = origin_of(folder)
    return None if origin is None else origin.title


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
    return folder if _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    """Whether all files of weights are there: a large model has several, and an index of them."""
    if (folder / "model.safetensors").exists():
        return True
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return all((folder / name).exists() for name in set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _patterns(spec: BaseSpec) -> list[str]:
    return [*_PATTERNS, "*.py"] if spec.trust_remote_code else _PATTERNS


def _packaged(spec: BaseSpec) -> Path | None:
    file = _in_package(spec)
    if file is None or file.suffix != gguf_base.SUFFIX:
        return file
    return gguf_base.kept_folder(file)


def _in_package(spec: BaseSpec) -> Path | None:
    """Return the folder or GGUF file of ``spec.package_path`` if its package is installed."""
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
    path = Path(found.origin).parent / inside
    if path.suffix == gguf_base.SUFFIX and spec.package_sha256 is not None:
        check_sha256(path, spec.package_sha256)
    return path


def _downloaded(spec: BaseSpec, *, weights: bool = True) -> Path:
    patterns = [p for p in _patterns(spec) if weights or p != _WEIGHTS]
    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        if (file := _readable_gguf(spec)) is not None:
            _LOGGER.info("reading %s once, which takes some twenty seconds", file.name)
            return gguf_base.read(file, spec.path)
        packaged = f", nor in the package {spec.package_path}" if spec.package_path else ""
        raise ModelError(
            f"model.path={spec.path} is no local folder, not in the hub's cache{packaged}, and "
            f"cannot be downloaded ({type(error).__name__}): {_ways_out(spec)}"
        ) from error


def _ways_out(spec: BaseSpec) -> str:
    if spec.package_path is None:
        return "give a folder, or go online"
    package = spec.package_path.partition("/")[0].replace("_", "-")
    return f"{install_command(package, alone=True)}, or give a folder, or go online"
