"""Requests that come one by one, in threads of their own, and are answered several at a time."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_LOGGER = logging.getLogger(__name__)
_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


@dataclass(frozen=True)
class _Waiting(Generic[_Request, _Reply]):
    request: _Request
    in_company: bool
    reply: "Future[_Reply]" = field(default_factory=Future)


class Gathering(Generic[_Request, _Reply]):
    """Gathers requests and answers them, all in one thread.

    A group that is not full is answered when none has come for a while: no sender says how many
    there will be, and those who wait for a reply send no other request.

    Parameters
    ----------
    together
        Answers several requests; None for each that is to be answered alone.
    alone
        Answers one request.
    size
        Returns how many to gather; it is asked before each group.
    pause_s
        Seconds without a request after which a group goes on as it is.

    Attributes
    ----------
    largest
        Requests that were answered together at most so far.
    """

    def __init__(
        self,
        together: Callable[[Sequence[_Request]], Sequence[_Reply | None]],
        alone: Callable[[_Request], _Reply],
        size: Callable[[], int],
        pause_s: float,
    ) -> None:
        self._together, self._alone = together, alone
        self._size, self._pause_s = size, pause_s
        self._queue: queue.SimpleQueue[_Waiting[_Request, _Reply]] = queue.SimpleQueue()
        self.largest = 0
        threading.Thread(target=self._run, daemon=True).start()

    def answer(self, request: _Request, *, in_company: bool) -> _Reply:
        """Return the reply to a request, once it is there.

        Parameters
        ----------
        in_company
            Whether others are worth waiting for; whatever `alone` raises is raised here.
        """
        waiting: _Waiting[_Request, _Reply] = _Waiting(request, in_company)
        self._queue.put(waiting)
        return waiting.reply.result()

    def _run(self) -> None:
        while True:
            self._settle(self._group())

    def _group(self) -> list[_Waiting[_Request, _Reply]]:
        """Wait for a request, then for as many others as may come."""
        group = [self._queue.get()]
        while group[-1].in_company and len(group) < self._size():
            try:
                group.append(self._queue.get(timeout=self._pause_s))
            except queue.Empty:
                break
        return group

    def _settle(self, group: Sequence[_Waiting[_Request, _Reply]]) -> None:
        replies: Sequence[_Reply | None] = [None] * len(group)
        if len(group) > 1:
            try:
                replies = self._together([waiting.request for waiting in group])
            except Exception:
                _LOGGER.warning("answered one at a time instead of together", exc_info=True)
        self.largest = max(self.largest, sum(reply is not None for reply in replies))
        left = []
        for waiting, reply in zip(group, replies, strict=True):
            if reply is None:
                left.append(waiting)
            else:
                waiting.reply.set_result(reply)
        for waiting in left:
            try:
                waiting.reply.set_result(self._alone(waiting.request))
            except BaseException as error:  # the thread must live on, and its caller must know
                waiting.reply.set_exception(error)
