"""Workers as named, detached actors on the node's own Ray."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Message

from hafl_app.client.warm_worker import worker as worker_module
from hafl_app.client.warm_worker.ask import (
    APP_FOLDER,
    PERMITTING,
    NoWorkerError,
    WorkerDiedError,
    WorkerFailedError,
)
from hafl_app.client.warm_worker.options import WorkerOptions
from hafl_app.client.warm_worker.ray_runtime import (
    LOOPBACK,
    connection_environment,
    is_listening,
    state_folder,
)
from hafl_app.client.warm_worker.worker import Answer

_LOGGER = logging.getLogger(__name__)
_NAMESPACE = "hafl"
_START_SECONDS = 120.0


@contextmanager
def connected(port: int) -> Iterator["RayWorkers"]:
    """Yield the workers of the node's Ray on a port.

    Raises
    ------
    NoWorkerError
        If there is no such Ray, it is not this user's, or Ray is not installed.
    """
    if not (state_folder(port) / "token").is_file() or not is_listening(port):
        raise NoWorkerError(
            f"no Ray of this node on {LOOPBACK}:{port} (scripts/node_worker.py starts it)"
        )
    os.environ.update(connection_environment(port))  # before Ray is imported: it reads it then
    try:
        import ray  # noqa: PLC0415  takes a second

        with warnings.catch_warnings(), _own_sigterm_handler():
            # Ray warns about a change of its own defaults.
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(
                address=f"{LOOPBACK}:{port}",
                namespace=_NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ImportError, ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise NoWorkerError(f"Ray on {LOOPBACK}:{port}: {reason}") from error
    try:
        yield RayWorkers()
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keep this process's SIGTERM handler: Flower's informs the SuperNode, Ray's does not."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


class RayWorkers:
    """The workers of the Ray that this process is connected to."""

    def __init__(self) -> None:
        import ray  # noqa: PLC0415  takes a second

        self._ray: Any = ray

    def names(self) -> list[str]:
        """Return the keys of the living workers."""
        found: list[str] = self._ray.util.list_named_actors()
        return sorted(found)

    def ask(
        self,
        key: str,
        options: WorkerOptions,
        message: Message,
        context: Context,
        permitting: Mapping[str, str],
    ) -> Answer:
        """Answer with a worker, see `hafl_app.client.warm_worker.ask.Workers`."""
        worker = self._worker(key, options)
        try:
            answer: Answer = self._ray.get(worker.answer.remote(message, context, permitting))
        except self._ray.exceptions.RayTaskError as error:
            _LOGGER.warning("the worker failed", exc_info=error)  # with its own traceback
            raise error.cause from None  # as in this process
        except self._ray.exceptions.RayActorError as error:
            self._ray.kill(worker)  # so that its name is free at once
            raise WorkerDiedError(" ".join(str(error).split())) from error
        return answer

    def report(self, key: str, timeout_s: float | None = None) -> dict[str, int]:
        """Return a worker's own report, see `hafl_app.client.warm_worker.worker.Worker.report`.

        Raises
        ------
        TimeoutError
            If it is busy for longer.
        ValueError
            If there is none.
        """
        worker = self._ray.get_actor(key)
        found: dict[str, int] = self._ray.get(worker.report.remote(), timeout=timeout_s)
        return found

    def _worker(self, key: str, options: WorkerOptions) -> Any:
        try:
            return self._ray.get_actor(key)
        except ValueError:
            return self._start(key, options)

    def _start(self, key: str, options: WorkerOptions) -> Any:
        num_gpus = self._gpus(options)
        self._retire_older(key)
        worker = self._actor_class().options(
            name=key,
            lifetime="detached",
            get_if_exists=True,  # another node of the same name may have been quicker
            num_cpus=0,
            num_gpus=num_gpus,
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith(PERMITTING)}
        handle = worker.remote(str(APP_FOLDER), environment, options.idle_s)
        try:
            self._ray.get(handle.report.remote(), timeout=_START_SECONDS)
        except self._ray.exceptions.GetTimeoutError as error:
            self._ray.kill(handle)
            raise WorkerFailedError(
                f"this node's worker did not start within {_START_SECONDS:.0f} s, with "
                f"{num_gpus:g} GPUs for itself: other workers may hold them (worker-name shares "
                "a worker, worker-gpus=0.5 a GPU)"
            ) from error
        except self._ray.exceptions.RayActorError as error:
            self._ray.kill(handle)
            raise WorkerDiedError(" ".join(str(error).split())) from error
        return handle

    def _gpus(self, options: WorkerOptions) -> float:
        available = self._ray.cluster_resources().get("GPU", 0.0)
        wanted = min(1.0, available) if options.gpus is None else options.gpus
        if wanted > available:
            raise WorkerFailedError(
                f"worker-gpus={wanted:g} of this node: its Ray has {available:g} GPUs"
            )
        return float(wanted)

    def _actor_class(self) -> Any:
        # The actor's process cannot import the app before it knows the app's folder.
        self._ray.cloudpickle.register_pickle_by_value(worker_module)
        return self._ray.remote(worker_module.Worker)

    def _retire_older(self, key: str) -> None:
        """End the workers of other versions of the code after their current message."""
        name = key.rpartition("/")[0]
        for other in self.names():
            if other.rpartition("/")[0] == name and other != key:
                self._ray.get_actor(other).retire.remote()
