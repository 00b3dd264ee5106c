"""Error replies of a node: exceptions of its handlers become faults with a safe reason."""

import errno
import functools
import logging
import os
from collections.abc import Callable, Iterator

from flwr.app import Context, Message

from hafl_app.client.node_config import NodeConfigError
from hafl_app.client.own_data import DATA_PATH
from hafl_app.client.permissions import NotAllowedError, shows_details
from hafl_app.client.terms import DEVICE, Terms
from hafl_app.config.compose import SettingsError
from hafl_app.data.errors import DataError, UnfitDataError
from hafl_app.printable import printable
from hafl_app.privacy.masking import SecureSumError
from hafl_app.privacy.mechanism import PrivacyError
from hafl_app.run.logs import show_log
from hafl_app.training.batches import is_out_of_memory
from hafl_app.training.device import DeviceError
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_layers import AdapterFitError
from hafl_app.training.task import DeviceMemoryError, LossNotFiniteError, TrainingError
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.faults import Fault, error_reply, unexpected

_LOGGER = logging.getLogger(__name__)
_LONGEST_LOGGED = 1000  # characters

Handler = Callable[[Message, Context], Message]


def fault_behind(
    error: Exception, *, names_device: bool = True, names_files: bool = False
) -> tuple[Fault, str] | None:
    """Return an exception's kind of fault, and a reason that may leave the node.

    Parameters
    ----------
    names_device
        Whether a reason may say what the device is and how much memory it has.
    names_files
        Whether it may quote files and rows.

    Returns
    -------
    tuple of Fault and str, or None
        None for an unexpected exception: that is for the node's own log, with its traceback.
    """
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in _NO_SPACE:
            where = f": {one.filename}" if names_files and one.filename else ""
            return Fault.DISK_FULL, f"no space left on a disk of this node{where}"
    if isinstance(error, DeviceMemoryError) and not names_device:
        return Fault.OUT_OF_MEMORY, _NO_MEMORY
    for kind, fault in _QUOTABLE.items():
        if isinstance(error, kind):
            return fault, str(error)
    if isinstance(error, DataError):
        # These messages may quote a file's path, a label or a cell, for the owner of the data.
        reason = str(error) if names_files else _NO_DATA
        return Fault.DATA_UNAVAILABLE, reason
    if is_out_of_memory(error):  # outside of training, where there is nothing to halve
        return Fault.OUT_OF_MEMORY, _NO_MEMORY
    return None


_NO_MEMORY = "this node's memory does not suffice"
_NO_DATA = "this node cannot read its data; its own log says why"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Their messages are made of settings, plans and requests, which come from the server, of counts,
# and of keys of the node's config: no value of that config, no path, label or text of the node.
_QUOTABLE: dict[type[Exception], Fault] = {
    DeviceMemoryError: Fault.OUT_OF_MEMORY,
    UnfitDataError: Fault.DATA_UNAVAILABLE,
    LossNotFiniteError: Fault.LOSS_NOT_FINITE,
    ModelError: Fault.MODEL_UNAVAILABLE,
    NodeConfigError: Fault.BAD_REQUEST,
    NotAllowedError: Fault.REFUSED,
    PrivacyError: Fault.REFUSED,
    SecureSumError: Fault.REFUSED,
    AdapterFitError: Fault.BAD_REQUEST,
    DeviceError: Fault.BAD_REQUEST,
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

    An unexpected exception is a fault too: Flower would send its text to the server.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        show_log()
        try:
            return handler(message, context)
        except Exception as error:
            kind, own = message.metadata.message_type, DATA_PATH in context.node_config
            found = fault_behind(
                error,
                names_device=_names_device(context),
                names_files=shows_details(os.environ, has_own_data=own),
            )
            if found is None:
                _LOGGER.exception("%s: unexpected error", kind)
                return unexpected(message, error)
            fault, reason = found
            # For the operator; what the server wrote must not forge lines in this log either.
            details = "; ".join(filter(None, (str(error), getattr(error, "details", ""))))
            _LOGGER.warning(
                "%s: %s (%s: %s)",
                *(kind, fault.name, type(error).__name__, printable(details, _LONGEST_LOGGED)),
            )
            return error_reply(message, fault, reason)

    return answer


def _names_device(context: Context) -> bool:
    try:
        return Terms.of(context.node_config).shares(DEVICE)
    except NodeConfigError:
        return False
