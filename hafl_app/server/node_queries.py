"""Queries to nodes, asked in the background: a node that does not answer delays no other."""

import time
from collections.abc import Callable, Iterable

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

_POLL_SECONDS = 0.2
_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0


class PendingQueries:
    """Queries that are sent and not answered yet.

    A node that keeps silent is asked again after a pause, which doubles from a minute to an hour:
    on a real device every query starts a process.

    Parameters
    ----------
    clock
        Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, int] = {}  # message id to node
        self._pauses: dict[int, float] = {}  # of silent nodes, in seconds
        self._ask_again: dict[int, float] = {}  # of silent nodes, the time
        self._met: set[int] = set()

    def ask(self, grid: Grid, node_ids: Iterable[int], content: RecordDict) -> set[int]:
        """Query these nodes, except those that were asked recently.

        Returns
        -------
        set of int
            Nodes that were asked for the first time: the ones worth a moment of waiting.
        """
        now = self._clock()
        due = [n for n in node_ids if now >= self._ask_again.get(n, now)]
        messages = [Message(content, node_id, MessageType.QUERY) for node_id in due]
        if messages:
            grid.push_messages(messages)  # gives each its id
        for message in messages:
            node_id = message.metadata.dst_node_id
            self._waiting[message.metadata.message_id] = node_id
            pause = min(2 * self._pauses.get(node_id, _FIRST_PAUSE / 2), _LONGEST_PAUSE)
            self._pauses[node_id], self._ask_again[node_id] = pause, now + pause
        first = set(due) - self._met
        self._met |= first
        return first

    def answers(
        self, grid: Grid, awaited: Iterable[int] = (), patience_s: float = 0.0
    ) -> list[tuple[int, Message]]:
        """Collect the answers so far, each once, in order of node id.

        Parameters
        ----------
        awaited
            Nodes to wait for, if they are silent, for ``patience_s`` at most.
        """
        missing, found = set(awaited), []
        end = self._clock() + patience_s
        while True:
            for reply in grid.pull_messages(list(self._waiting)) if self._waiting else ():
                node_id = self._waiting.pop(reply.metadata.reply_to_message_id, None)
                if node_id is None:  # to no query of ours
                    continue
                found.append((node_id, reply))
                missing.discard(node_id)
                self._pauses.pop(node_id, None)
                self._ask_again.pop(node_id, None)
            if not missing or self._clock() >= end:
                return sorted(found, key=lambda pair: pair[0])
            time.sleep(_POLL_SECONDS)
