"""Folders and processes of a deployment, and what a killed one left behind."""

import json
import os
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hafl_app.engines.processes import HOME_PREFIX, stop_processes
from hafl_app.process_identity import identity, is_alive

_PREFIX = f"{HOME_PREFIX}deployment-"
_RECORD = "owner.json"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class OwnFolder:
    """A temporary folder marked with its owner's identity.

    Parameters
    ----------
    path
        The folder, of mode 0700.
    token
        By which `stop_processes` finds the processes that belong to it.
    """

    path: Path
    token: str


@contextmanager
def own_folder() -> Iterator[OwnFolder]:
    """Yield a new folder; at the end its processes are stopped and it is removed.

    After a kill -9 of this process `remove_abandoned` does so.
    """
    made = OwnFolder(Path(tempfile.mkdtemp(prefix=_PREFIX)), uuid.uuid4().hex)
    record = {"owner": identity(os.getpid()), "token": made.token}
    (made.path / _RECORD).write_text(json.dumps(record))
    try:
        yield made
    finally:
        with _signals_ignored():
            stop_processes(made.token)
            shutil.rmtree(made.path, ignore_errors=True)


def remove_abandoned() -> int:
    """Stop the processes and remove the folders of this user's deployments that were killed.

    Returns
    -------
    int
        Number of deployments that were removed.
    """
    count = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            mine = not folder.is_symlink() and folder.stat().st_uid == os.getuid()
            record = json.loads((folder / _RECORD).read_text()) if mine else None
            owner, token = (record["owner"], record["token"]) if record else ("", "")
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not whole yet, or gone meanwhile
        if not token or is_alive(owner):
            continue
        stop_processes(token)
        shutil.rmtree(folder, ignore_errors=True)
        count += 1
    return count


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore Ctrl-C and the like during cleanup: a second one must not leave half of it running."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
