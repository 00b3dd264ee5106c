"""Ask the node's warm worker, and start it again once if it dies.

A worker is known by ``<name>/<hash of the app's code>``. It keeps one base model at a time, that of
the latest message; it lives in `hafl_app.client.warm_worker.ray_workers`.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from flwr.app import Context, Message

from hafl_app.client.warm_worker.options import WorkerOptions
from hafl_app.client.warm_worker.worker import Answer

_LOGGER = logging.getLogger(__name__)
APP_FOLDER = Path(__file__).resolve().parents[2]
PERMITTING = "HAFL_ALLOW"  # how the variables of `hafl_app.client.permissions` begin


class NoWorkerError(RuntimeError):
    """There is no Ray to ask; the message may be answered elsewhere."""


class WorkerFailedError(RuntimeError):
    """A worker that did not start or died twice; the message is one line fit for the server."""


class WorkerDiedError(RuntimeError):
    """A worker's process that ended before it had answered."""


class Workers(Protocol):
    """The workers of one Ray."""

    def ask(
        self,
        key: str,
        options: WorkerOptions,
        message: Message,
        context: Context,
        permitting: Mapping[str, str],
    ) -> Answer:
        """Answer a message with the worker of this key; it is started if need be.

        Raises
        ------
        WorkerDiedError
            If it ends before it has answered; the next call starts another.
        WorkerFailedError
            If it cannot be started.
        """


def ask_worker(
    workers: Workers, options: WorkerOptions, message: Message, context: Context
) -> Message:
    """Answer a message with a worker; ``context.state`` becomes the worker's.

    Raises
    ------
    WorkerFailedError
        If the worker dies, and the one started in its place dies as well, or none starts.
    """
    key = f"{options.name}/{code_hash(APP_FOLDER)}"
    permitting = {k: v for k, v in os.environ.items() if k.startswith(PERMITTING)}
    for _ in range(2):
        try:
            answer = workers.ask(key, options, message, context, permitting)
        except WorkerDiedError as error:
            _LOGGER.warning("worker %s: %s", key, error)
            continue
        for line in answer.log:
            print(line, file=sys.stderr)  # noqa: T201  formatted there, as in this process
        context.state = answer.state
        return answer.reply  # type: ignore[no-any-return]
    raise WorkerFailedError("this node's worker died twice over one message; its own log says why")


def code_hash(app_folder: Path) -> str:
    """Return a hash of the app's code, in 12 hexadecimal digits."""
    digest = hashlib.sha256(str(app_folder).encode())
    for folder, pattern in (("hafl_app", "*.py"), ("conf", "*.yaml")):
        for path in sorted((app_folder / folder).rglob(pattern)):
            digest.update(f"\0{path.relative_to(app_folder)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
