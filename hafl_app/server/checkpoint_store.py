"""Checkpoints of a run: tensors and plain JSON, one safetensors file for each round.

Guaranteed: a checkpoint appears whole or not at all, also when the process is killed or the power
fails while it is written; a failed write leaves the earlier ones as they were; what is read equals
what was saved bit for bit, or the file is refused. Nothing in a file is ever executed: safetensors
and JSON hold data only.

Not guaranteed: the checksum detects damage, not forgery. Whoever can write to the folder can write
a checkpoint with any content and a checksum that fits. One process at a time may save to a folder.
"""

import hashlib
import json
import logging
import os
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hafl_app.disk import naming
from hafl_app.server.checkpoint_files import checkpoint_file, newest_first
from hafl_app.training.tensor_files import ready_to_write, write_tensors

_LOGGER = logging.getLogger(__name__)
_FORMAT, _VERSION = "hafl-checkpoint", 1
# Names in the file; the prefix keeps a tensor of any name apart from state and header.
_STATE, _PREFIX = "state", "tensor/"
# What safetensors, JSON and torch raise for content that they cannot write or read.
_UNFIT = (SafetensorError, ValueError, TypeError, LookupError, AssertionError, RuntimeError)


class CheckpointError(ValueError):
    """Content that cannot be a checkpoint, or a file that is no whole one."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was saved.

    Parameters
    ----------
    server_round
        The last round that it includes.
    tensors
        Name to tensor, on the CPU, in the order saved.
    state
        Plain JSON.
    path
        File that it was read from.
    """

    server_round: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    path: Path


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Parameters
    ----------
    folder
        Created by the first `save`.
    keep
        Number of checkpoints that stay, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._folder, self._keep = folder, keep

    def save(
        self, server_round: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint, replace one of the same round, and remove those too old to keep.

        Checkpoints of later rounds are left alone, and do not count.

        Parameters
        ----------
        server_round
            From 0.
        tensors
            Any names, any shapes, any dtype that safetensors writes and reads.
        state
            Nested dict, list, str, int, float (NaN and infinities too), bool and None.

        Raises
        ------
        CheckpointError
            If the content would not survive, before anything is written.
        OSError
            If it cannot be written, for instance because the disk is full.
        """
        content, header = _encode(server_round, tensors, state)
        path = checkpoint_file(self._folder, server_round)
        self._folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(self._folder)
        _write_atomically(path, content, header)
        past = [file for number, file in newest_first(self._folder) if number <= server_round]
        _remove(past[self._keep :])
        return path

    def latest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None if the folder never had one.

        A file that is damaged, foreign, unreadable or of a newer format is logged and passed over.

        Raises
        ------
        CheckpointError
            If there are files but none is whole, with the reason for each.
        """
        reasons = []
        for number, path in newest_first(self._folder):
            try:
                return _read(path, number)
            except CheckpointError as error:
                _LOGGER.warning("checkpoint passed over: %s", error)
                reasons.append(str(error))
        if reasons:
            raise CheckpointError(f"{self._folder}: no whole checkpoint: {'; '.join(reasons)}")
        return None


def _encode(
    server_round: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what the file holds, and its header. A large model is not copied."""
    if server_round < 0:
        raise CheckpointError(f"server_round must be at least 0, got {server_round}")
    try:
        _check_json(state, "state")
        # With the names: safetensors puts tensors in an order of its own.
        text = bytearray(json.dumps([list(tensors), state]).encode())
        named = {_PREFIX + name: tensor for name, tensor in tensors.items()}
        content = ready_to_write({_STATE: torch.frombuffer(text, dtype=torch.uint8), **named})
        header = {"format": _FORMAT, "version": str(_VERSION), "round": str(server_round)}
        _check_readable(content)
        header["sha256"] = _digest(server_round, content)
    except _UNFIT as error:
        raise CheckpointError(
            f"round {server_round} cannot be a checkpoint: {_line(error)}"
        ) from error
    return content, header


def _check_readable(content: Mapping[str, Tensor]) -> None:
    """Refuse names and dtypes that can be written but not read, by tensors without a number."""
    empty = {name: tensor.new_empty(0) for name, tensor in content.items()}
    load(save(empty))


def _decode(data: bytes) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    content = load(data)
    # Valid once `load` has read it: 8 bytes of length, then that many of JSON.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = header.get("__metadata__") or {}
    if facts.get("format") != _FORMAT:
        raise CheckpointError("a safetensors file, but not a checkpoint")
    if int(facts["version"]) > _VERSION:
        raise CheckpointError(
            f"written in format version {facts['version']}, newer than {_VERSION}, the newest "
            "that can be read here"
        )
    server_round = int(facts["round"])
    if _digest(server_round, content) != facts["sha256"]:
        raise CheckpointError("damaged: its content does not have the SHA-256 of its header")
    names, state = json.loads(content[_STATE].numpy().tobytes())
    return server_round, {name: content[_PREFIX + name] for name in names}, state


def _digest(server_round: int, content: Mapping[str, Tensor]) -> str:
    """Hash everything there is; dtype and shape say where a tensor's bytes end."""
    digest = hashlib.sha256(json.dumps([_FORMAT, _VERSION, server_round]).encode())
    for name in sorted(content):
        tensor = content[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_json(value: object, where: str) -> None:
    """Refuse what JSON would write as something else, such as tuples or numbers as keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is {type(key).__name__}, expected str")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _check_json(item, f"{where}[{position}]")
    elif not isinstance(value, str | int | float | None):
        raise TypeError(f"{where} is {type(value).__name__}, expected a plain JSON value")


def _read(path: Path, server_round: int) -> Checkpoint:
    try:
        if not path.is_file():
            raise CheckpointError("not a regular file")
        stored_round, tensors, state = _decode(path.read_bytes())
    except (OSError, *_UNFIT) as error:
        raise CheckpointError(f"{path}: {_line(error)}") from error
    if stored_round != server_round:
        raise CheckpointError(f"{path}: holds round {stored_round}, expected {server_round}")
    return Checkpoint(server_round, tensors, state, path)


def _line(error: Exception) -> str:
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    return kind + textwrap.shorten(str(error), 300)


def _write_atomically(path: Path, content: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    # Readable by its owner alone: it may hold the key of a private run's noise. A folder, since
    # safetensors writes to a name of its own first, which would be left after a kill.
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.mkdir(mode=0o700)
    try:
        temporary = scratch / path.name
        with naming(path):
            write_tensors(temporary, content, header)
            temporary.chmod(0o600)
            _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left; files were an earlier version's."""
    for left in folder.glob(".round-*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            _remove([left])


def _sync(path: Path) -> None:
    # A file's fsync does not cover its name: that is content of its folder.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # the new checkpoint is what counts
            _LOGGER.warning("%s could not be removed: %s", path, error)
