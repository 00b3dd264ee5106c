"""Sending a round's messages and taking in the replies: Flower's push and pull, in one place.

Flower's own `Grid.send_and_receive` looks for replies of real nodes every three seconds, gives them
their messages in no chosen order, and holds all replies before it returns the first.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_PAUSE_SHARE = 0.005  # a pause between two polls is this share of the time waited so far
# Flower's Ray engine takes waiting messages up every 0.1 s, in the order of its nodes.
_WAVE_PAUSE_S = 0.15

ANSWERS_AT_ONCE = "answers_at_once"
"""Attribute of a grid whose nodes answer while a message is pushed, one after another.

Such a grid calls its attribute ``on_answer`` with the id of each node that has answered."""

Sleep = Callable[[float], None]


class Watch(Protocol):
    """Follows the exchanges of a run while they go on."""

    def begin(self, stage: str, server_round: int) -> None:
        """Begin a stage of the run."""

    def asked(self, node_ids: Sequence[int]) -> None:
        """Nodes have been asked, in the stage that goes on."""

    def answered(self, node_id: int) -> None:
        """Record that a node has answered."""


class Unwatched:
    """Follows nothing."""

    def begin(self, stage: str, server_round: int) -> None:
        """Do nothing."""

    def asked(self, node_ids: Sequence[int]) -> None:
        """Do nothing."""

    def answered(self, node_id: int) -> None:
        """Do nothing."""


UNWATCHED = Unwatched()


def all_replies(
    grid: Grid,
    messages: Iterable[Message],
    timeout_s: float,
    seconds: Mapping[int, float] | None = None,
    *,
    watch: Watch = UNWATCHED,
    sleep: Sleep = time.sleep,
) -> list[Message]:
    """Send the messages and return the replies that arrive in time, as they arrive.

    Parameters
    ----------
    timeout_s
        Seconds to wait for all replies, above 0.
    seconds
        Node id to the seconds that its last reply took. The slower half of the nodes, and those
        without a known time, are asked first: if they share a machine, as in a simulation, the
        slowest does not come last. Empty or None asks all at once.
    watch
        Told of every message and reply as it goes and comes.
    sleep
        Waits between two polls, for seconds.
    """
    messages = list(messages)
    watch.asked(_nodes(messages))
    if getattr(grid, ANSWERS_AT_ONCE, False):
        grid.on_answer = watch.answered  # type: ignore[attr-defined]
        return list(grid.send_and_receive(messages, timeout=timeout_s))
    waiting: set[str] = set()
    for number, wave in enumerate(_waves(messages, seconds or {})):
        if number:
            sleep(_WAVE_PAUSE_S)
        waiting.update(_push(grid, wave))
    replies: list[Message] = []
    for _ in _polls(timeout_s, sleep):
        for reply in grid.pull_messages(list(waiting)) if waiting else ():
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
            watch.answered(reply.metadata.src_node_id)
        if not waiting:
            break
    return replies


def _waves(messages: list[Message], seconds: Mapping[int, float]) -> list[list[Message]]:
    """Cut the messages into those that are sent first and the others, if that is worth a pause."""

    def cost(message: Message) -> float:
        return seconds.get(message.metadata.dst_node_id, float("inf"))

    ordered = sorted(messages, key=cost, reverse=True)
    half = (len(ordered) + 1) // 2
    first, rest = ordered[:half], ordered[half:]
    # No node may be idle in the pause, and the others must be known to be faster.
    worth = rest and cost(first[-1]) >= _WAVE_PAUSE_S and cost(rest[0]) < float("inf")
    return [first, rest] if worth else [messages]


def replies_in_order(
    grid: Grid,
    messages: Iterable[Message],
    timeout_s: float,
    buffer: int,
    *,
    watch: Watch = UNWATCHED,
    sleep: Sleep = time.sleep,
) -> Iterator[Message]:
    """Send the messages and yield the replies in the order of the messages.

    A reply that is not its turn yet stays with Flower until one of the next ``buffer`` turns is its
    own. So what is computed from the replies does not depend on when they arrive, and memory not
    on how many there are. All nodes are asked at once, except in the in-process engine, which
    would keep every answer: there no more than ``buffer`` are ahead.

    Parameters
    ----------
    timeout_s
        Seconds to wait for all replies, above 0. What has arrived by then is yielded still.
    buffer
        Replies held at once, at least 1.
    watch
        Told of every message, and of a reply when it is its turn.
    sleep
        Waits between two polls, for seconds.
    """
    rest, waiting, arrived = iter(messages), deque[str](), dict[str, Message]()
    while chunk := list(islice(rest, buffer)):
        watch.asked(_nodes(chunk))
        if getattr(grid, ANSWERS_AT_ONCE, False):
            grid.on_answer = watch.answered  # type: ignore[attr-defined]
        pushed = _push(grid, chunk)
        if getattr(grid, ANSWERS_AT_ONCE, False):
            replies = {r.metadata.reply_to_message_id: r for r in grid.pull_messages(pushed)}
            yield from (replies.pop(name) for name in pushed if name in replies)
        else:
            waiting.extend(pushed)
    if not waiting:
        return
    for late in _polls(timeout_s, sleep):
        progress = True
        while waiting and progress:
            window = [name for name in islice(waiting, buffer) if name not in arrived]
            for reply in grid.pull_messages(window):
                arrived[reply.metadata.reply_to_message_id] = reply
            turns = 0
            while waiting and (waiting[0] in arrived or (late and turns < buffer)):
                turns += 1
                name = waiting.popleft()
                if name in arrived:
                    reply = arrived.pop(name)
                    watch.answered(reply.metadata.src_node_id)
                    yield reply
            progress = turns > 0
        if not waiting:
            break


def _polls(timeout_s: float, sleep: Sleep) -> Iterator[bool]:
    """Yield False whenever replies are to be polled, and True for the last poll, at the end.

    The longer the wait has been, the longer the pauses.
    """
    started = time.monotonic()
    while (waited := time.monotonic() - started) < timeout_s:
        yield False
        pause = min(max(_SHORTEST_PAUSE_S, _PAUSE_SHARE * waited), _LONGEST_PAUSE_S)
        sleep(min(pause, max(0.0, timeout_s - (time.monotonic() - started))))
    yield True


def _nodes(messages: Iterable[Message]) -> list[int]:
    return [message.metadata.dst_node_id for message in messages]


def _push(grid: Grid, messages: Iterable[Message]) -> list[str]:
    """Send messages and return their ids; one that could not be sent has none."""
    chosen = list(messages)
    return [name for name in grid.push_messages(chosen) if name] if chosen else []
