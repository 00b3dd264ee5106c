"""Routing of a message: to the node's warm worker or a trainer, else to this process."""

import logging
import os

from flwr.app import Context, Message

from hafl_app.client.ray_trainers import ask_trainer, number_of_trainers
from hafl_app.client.warm_worker.ask import NoWorkerError, WorkerFailedError, ask_worker
from hafl_app.client.warm_worker.options import WorkerOptions, WorkerOptionsError
from hafl_app.client.warm_worker.ray_workers import connected

_LOGGER = logging.getLogger(__name__)


def answer(message: Message, context: Context) -> Message:
    """Answer a message of Flower's.

    A node whose config names a worker is answered by it, and in a simulation with trainers by one
    of them. Without Ray the message is answered in this process, which takes longer; a worker that
    fails is an error reply, for the same training would make this process fail likewise. No
    exception is left to Flower, which sends its text to the server.
    """
    try:
        options = WorkerOptions.of(context.node_config, context.node_id)
        if options is None:
            if trainers := number_of_trainers(os.environ):
                return ask_trainer(trainers, message, context)
            return answer_here(message, context)
        with connected(options.port) as workers:
            return ask_worker(workers, options, message, context)
    except NoWorkerError as error:
        _LOGGER.warning("%s: answering without a warm worker, which takes longer", error)
        return answer_here(message, context)
    except (WorkerOptionsError, WorkerFailedError) as error:
        from hafl_app.wire.faults import Fault, error_reply  # noqa: PLC0415  imports torch

        _LOGGER.warning("%s; %s", error, getattr(error, "details", ""))
        return error_reply(message, Fault.WORKER_FAILED, str(error))
    except Exception as error:
        from hafl_app.wire.faults import unexpected  # noqa: PLC0415

        _LOGGER.exception("%s: unexpected error", message.metadata.message_type)
        return unexpected(message, error)


def answer_here(message: Message, context: Context) -> Message:
    """Answer a message in this process."""
    from hafl_app.client.handlers import HANDLERS  # noqa: PLC0415  imports torch

    return HANDLERS[message.metadata.message_type](message, context)
