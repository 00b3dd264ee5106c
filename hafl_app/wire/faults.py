"""What a client answers with when it cannot do what it was asked: a kind and a reason.

Flower turns whatever a ClientApp raises into a reply with one and the same code; what a server
can act upon has a code of its own here.
"""

import errno
import functools
import logging
from collections.abc import Callable, Iterator
from enum import IntEnum

from flwr.app import Context, Error, Message

from hafl_app.client.permissions import NotAllowedError
from hafl_app.config.compose import SettingsError
from hafl_app.data.errors import DataError, UnfitDataError
from hafl_app.privacy.mechanism import PrivacyError
from hafl_app.training.base_model import ModelError
from hafl_app.training.batches import is_out_of_memory
from hafl_app.training.local import DeviceMemoryError, LossNotFiniteError, TrainingError
from hafl_app.wire.arrays import RecordError

_LOGGER = logging.getLogger(__name__)
_LONGEST_REASON = 300  # characters

Handler = Callable[[Message, Context], Message]


class Fault(IntEnum):
    """Kinds of error replies; Flower's own codes (`flwr.common.constant.ErrorCode`) are below 10.

    They travel as numbers: a number keeps its meaning for good.
    """

    OUT_OF_MEMORY = 1001  # a smaller rank may fit
    LOSS_NOT_FINITE = 1002
    DATA_UNAVAILABLE = 1003
    MODEL_UNAVAILABLE = 1004
    DISK_FULL = 1005
    REFUSED = 1006  # the node's owner does not allow it
    BAD_REQUEST = 1007  # the message, or the settings, ask for what cannot be done
    WORKER_FAILED = 1008  # the node's own warm process died, or cannot be used


def error_reply(message: Message, fault: Fault, reason: str) -> Message:
    """Return the reply that says what went wrong instead of bringing numbers.

    Parameters
    ----------
    message
        What is answered.
    reason
        Made one line of at most 300 characters. It leaves the node, so it must hold nothing of
        the node's data, and no secret.
    """
    return Message(Error(int(fault), one_line(reason)), reply_to=message)


def one_line(reason: str) -> str:
    """Return a reason on one line, of at most 300 characters."""
    return " ".join(reason.split())[:_LONGEST_REASON]


def fault_of(reply: Message) -> Fault | None:
    """Return the kind of fault that a node reports; None for content and Flower's own errors."""
    if reply.has_error() and reply.error.code in set(Fault):
        return Fault(reply.error.code)
    return None


def fault_behind(error: Exception) -> tuple[Fault, str] | None:
    """Return the kind of fault that an exception means, and a reason fit to leave the node.

    Returns
    -------
    tuple of Fault and str, or None
        None for what nobody foresaw: that is for the node's own log, with its traceback.
    """
    if any(isinstance(e, OSError) and e.errno in _NO_SPACE for e in _chain(error)):
        return Fault.DISK_FULL, "no space left on a disk of this node"
    for kind, fault in _TOLD_IN_FULL.items():
        if isinstance(error, kind):
            return fault, str(error)
    if isinstance(error, DataError):
        # These messages may quote a file's path, a label or a cell, for whoever owns the data.
        return Fault.DATA_UNAVAILABLE, "this node cannot read its data; its own log says why"
    if is_out_of_memory(error):  # outside of training, where there is nothing to halve
        return Fault.OUT_OF_MEMORY, "this node's memory does not suffice"
    return None


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Their messages are made of settings and plans, which come from the server, and of counts.
_TOLD_IN_FULL: dict[type[Exception], Fault] = {
    DeviceMemoryError: Fault.OUT_OF_MEMORY,
    UnfitDataError: Fault.DATA_UNAVAILABLE,
    LossNotFiniteError: Fault.LOSS_NOT_FINITE,
    ModelError: Fault.MODEL_UNAVAILABLE,
    NotAllowedError: Fault.REFUSED,
    PrivacyError: Fault.REFUSED,
    RecordError: Fault.BAD_REQUEST,
    SettingsError: Fault.BAD_REQUEST,
    TrainingError: Fault.BAD_REQUEST,
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from: a full disk may come wrapped."""
    while error is not None:
        yield error
        error = error.__cause__


def answering_faults(handler: Handler) -> Handler:
    """Let a handler of a ClientApp reply with the fault instead of raising it.

    Exceptions that mean no known fault are raised as before; Flower replies for them.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            found = fault_behind(error)
            if found is None:
                raise
            fault, reason = found
            _LOGGER.warning(
                "%s: %s (%s: %s)",
                message.metadata.message_type,
                fault.name,
                type(error).__name__,
                error,
            )
            return error_reply(message, fault, reason)

    return answer
