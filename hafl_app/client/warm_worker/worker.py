"""The process that stays warm: it keeps a run's base model and tokenized data between messages.

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

_FORMAT = "%(levelname)s %(name)s: %(message)s"
_PACKAGE = "hafl_app"


@dataclass(frozen=True)
class Answer:
    """What comes back from the worker.

    Parameters
    ----------
    reply
        A message of Flower's.
    state
        What the node keeps until the next message, a record dict of Flower's.
    log
        What was logged meanwhile, one formatted record each.
    """

    reply: Any
    state: Any
    log: tuple[str, ...]


def end_this_actor() -> None:
    """End the Ray actor that this process is."""
    import ray  # noqa: PLC0415  only here

    ray.kill(ray.get_runtime_context().current_actor)


class Worker:
    """Answers the messages of a node, one after another, and ends when none has come for a while.

    Parameters
    ----------
    app_folder
        Folder that holds the package: this worker's code for good.
    environment
        Of the process that asks, without what permits anything: that comes with each message.
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
        """Answer a message as the process that asks would.

        Parameters
        ----------
        message, context
            Flower's.
        permitting
            The variables of the asking process's environment that permit something.
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
            # Files may have changed since: what is kept is kept within a run.
            forget()
            self._run_id = context.run_id
        context.node_config = spelled_out(context.node_config, permitting)
        with _Listening() as heard:
            reply = HANDLERS[message.metadata.message_type](message, context)
        return Answer(reply, context.state, tuple(heard.lines))

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


def forget() -> None:
    """Drop whatever the app's functions have cached in this process."""
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == _PACKAGE]
    for cached in {id(c): c for m in modules for c in _caches(m)}.values():
        cached.cache_clear()


def _caches(module: ModuleType) -> list[Any]:
    kind = type(functools.lru_cache(maxsize=1)(_caches))
    return [value for value in vars(module).values() if isinstance(value, kind)]


def _take_over(environment: Mapping[str, str]) -> None:
    """Let this process have another's environment; Ray's part of it, and its GPUs, stay."""
    ours = {k: v for k, v in os.environ.items() if _is_of_ray(k)}
    theirs = {k: v for k, v in environment.items() if not _is_of_ray(k)}
    os.environ.clear()
    os.environ.update(theirs | ours)


def _is_of_ray(name: str) -> bool:
    return name.startswith("RAY_") or name.endswith("_VISIBLE_DEVICES")


class _Listening(logging.Handler):
    """Collects what the app logs within a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter(_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def __enter__(self) -> "_Listening":
        logging.getLogger(_PACKAGE).addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger(_PACKAGE).removeHandler(self)
