"""Faults: error replies of a client with a kind and a reason.

Flower turns every exception of a ClientApp into a reply with the same code; kinds that a server
can act upon have a code of their own here.
"""

from enum import IntEnum

from flwr.app import Error, Message

from hafl_app.printable import printable

_LONGEST_REASON = 300  # characters


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
    BAD_REQUEST = 1007  # the message or the settings are wrong for this node
    WORKER_FAILED = 1008  # the node's own warm process died, or cannot be used
    UNEXPECTED = 1009  # an error without a kind of its own


def error_reply(message: Message, fault: Fault, reason: str) -> Message:
    """Return the error reply to a message.

    Parameters
    ----------
    message
        The request.
    reason
        Shortened to one line of at most 300 characters. It leaves the node, so it must contain
        nothing of the node's data, and no secret.
    """
    return Message(Error(int(fault), one_line(reason)), reply_to=message)


def unexpected(message: Message, error: BaseException) -> Message:
    """Return the error reply for an exception that has no kind of its own.

    Flower would send the exception's text to the server, which may quote a path or a text.
    """
    reason = f"unexpected {type(error).__name__} on this node; its own log has the traceback"
    return error_reply(message, Fault.UNEXPECTED, reason)


def one_line(reason: str) -> str:
    """Return a reason on one line of about 300 characters, without control characters."""
    return printable(reason, _LONGEST_REASON)


def fault_of(reply: Message) -> Fault | None:
    """Return the fault that a reply reports; None for content and Flower's own errors."""
    if reply.has_error() and reply.error.code in set(Fault):
        return Fault(reply.error.code)
    return None
