"""Error replies of a node: exceptions of its handlers become faults with a safe reason."""

import errno
import functools
import logging
from collections.abc import Callable, Iterator

from flwr.app import Context, Message

from hafl_app.client.permissions import NotAllowedError
from hafl_app.config.compose import SettingsError
from hafl_app.data.errors import DataError, UnfitDataError
from hafl_app.privacy.mechanism import PrivacyError
from hafl_app.run.logs import show_log
from hafl_app.training.base_model import ModelError
from hafl_app.training.batches import is_out_of_memory
from hafl_app.training.local import DeviceMemoryError, LossNotFiniteError, TrainingError
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.faults import Fault, error_reply

_LOGGER = logging.getLogger(__name__)

Handler = Callable[[Message, Context], Message]


def fault_behind(error: Exception) -> tuple[Fault, str] | None:
    """Return an exception's kind of fault, and a reason that may leave the node.

    Returns
    -------
    tuple of Fault and str, or None
        None for an unexpected exception: that is for the node's own log, with its traceback.
    """
    if any(isinstance(e, OSError) and e.errno in _NO_SPACE for e in _chain(error)):
        return Fault.DISK_FULL, "no space left on a disk of this node"
    for kind, fault in _QUOTABLE.items():
        if isinstance(error, kind):
            return fault, str(error)
    if isinstance(error, DataError):
        # These messages may quote a file's path, a label or a cell, for the owner of the data.
        return Fault.DATA_UNAVAILABLE, "this node cannot read its data; its own log says why"
    if is_out_of_memory(error):  # outside of training, where there is nothing to halve
        return Fault.OUT_OF_MEMORY, "this node's memory does not suffice"
    return None


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Their messages are made of settings and plans, which come from the server, and of counts.
_QUOTABLE: dict[type[Exception], Fault] = {
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
    """Yield an exception and its causes: a full disk may come wrapped."""
    while error is not None:
        yield error
        error = error.__cause__


def errors_as_replies(handler: Handler) -> Handler:
    """Make a handler of a ClientApp reply with the fault instead of raising it.

    Unexpected exceptions are raised; Flower replies for them.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        show_log()
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
