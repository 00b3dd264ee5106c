"""The warm worker: a process that keeps a run's base model and tokenized data between messages.

Its class travels to the node's Ray by value, since the app's folder is not yet known to Python
there; so this module imports the standard library alone, and the rest of the app when it answers.
"""

import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_PACKAGE = "hafl_app"


@dataclass(frozen=True)
class Answer:
    """A worker's answer to a message.

    Parameters
    ----------
    reply
        A message of Flower's.
    state
        The node's state until the next message, a record dict of Flower's.
    log
        Log records of the message, one formatted line each.
    """

    reply: Any
    state: Any
    log: tuple[str, ...]


def end_this_actor() -> None:
    """End the Ray actor that this process is."""
    import ray  # noqa: PLC0415  only here

    ray.kill(ray.get_runtime_context().current_actor)


class Worker:
    """Answers a node's messages one after another, and ends when it has been idle for long.

    Parameters
    ----------
    app_folder
        Folder that holds the package: this worker's code for good.
    environment
        Of the process that asks, without permissions: those come with each message.
    idle_s
        Seconds without a message after which `end` is called.
    end
        Ends this process.
    """

    def __init__(
        self,
        app_folder: str,
        environment: Mapping[str, str],
        idle_s: float,
        end: Callable[[], None] = end_this_actor,
    ) -> None:
        _take_over(environment)
        sys.path.insert(0, app_folder)
        self._idle_s = idle_s
        self._end = end
        self._run_id: int | None = None
        self._messages = 0
        self._busy = False
        self._last = time.monotonic()
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def answer(self, message: Any, context: Any, permitting: Mapping[str, str]) -> Answer:
        """Answer a message in place of the process that asks.

        Parameters
        ----------
        message, context
            Flower's.
        permitting
            The permissions in the asking process's environment.
        """
        self._busy = True
        try:
            return self._answer(message, context, permitting)
        finally:
            self._messages += 1
            self._last = time.monotonic()
            self._busy = False

    def _answer(self, message: Any, context: Any, permitting: Mapping[str, str]) -> Answer:
        from hafl_app.client.handlers import HANDLERS  # noqa: PLC0415
        from hafl_app.client.permissions import spelled_out  # noqa: PLC0415  only here

        if context.run_id != self._run_id:
            # Files may have changed since: caches are valid within a run.
            clear_caches()
            self._run_id = context.run_id
        context.node_config = spelled_out(context.node_config, permitting)
        with _CollectedLog() as log:
            reply = HANDLERS[message.metadata.message_type](message, context)
        return Answer(reply, context.state, tuple(log.lines))

    def report(self) -> dict[str, int]:
        """Return the process id, its messages so far, and the base models loaded for this run."""
        models = sys.modules.get("hafl_app.training.lora_model")
        cached = models.resident_model.cache_info() if models else None
        loads = cached.misses if cached else 0
        return {"pid": os.getpid(), "messages": self._messages, "models_loaded": loads}

    def retire(self) -> None:
        """End after the messages that are already waiting: a newer version takes over."""
        self._end()

    def _end_when_idle(self) -> None:
        while self._busy or time.monotonic() - self._last < self._idle_s:
            time.sleep(min(1.0, self._idle_s / 4))
        self._end()


def clear_caches() -> None:
    """Clear the caches of the app's functions in this process."""
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == _PACKAGE]
    for cached in {id(c): c for m in modules for c in _caches(m)}.values():
        cached.cache_clear()


def _caches(module: ModuleType) -> list[Any]:
    kind = type(functools.lru_cache(maxsize=1)(_caches))
    return [value for value in vars(module).values() if isinstance(value, kind)]


def _take_over(environment: Mapping[str, str]) -> None:
    """Replace this process's environment by another's, except for Ray's variables and GPUs."""
    ours = {k: v for k, v in os.environ.items() if _is_of_ray(k)}
    theirs = {k: v for k, v in environment.items() if not _is_of_ray(k)}
    os.environ.clear()
    os.environ.update(theirs | ours)


def _is_of_ray(name: str) -> bool:
    return name.startswith("RAY_") or name.endswith("_VISIBLE_DEVICES")


class _CollectedLog(logging.Handler):
    """Log records of the app within a ``with`` block, as formatted lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        from hafl_app.run.logs import LogFormatter  # noqa: PLC0415  not by value

        self.setFormatter(LogFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def __enter__(self) -> "_CollectedLog":
        logging.getLogger(_PACKAGE).addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger(_PACKAGE).removeHandler(self)
