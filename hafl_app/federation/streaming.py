"""Replies one after another in a fixed order, a few in memory at once: Flower's push and pull.

Flower's `Grid.send_and_receive` holds all replies of a round before it returns the first.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from flwr.app import Message
from flwr.serverapp import Grid

from hafl_app.federation.inprocess import InProcessGrid

_POLL_S = 1.0


def replies_in_order(
    grid: Grid,
    messages: Iterable[Message],
    timeout_s: float,
    buffer: int,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Message]:
    """Send the messages and yield the replies in the order of the messages.

    A reply that is not its turn yet stays with Flower until one of the next ``buffer`` turns is its
    own. So what is computed from the replies does not depend on when they arrive, and memory not
    on how many there are. All nodes are asked at once, except in the in-process engine, which
    would keep every answer: there no more than ``buffer`` are ahead.

    Parameters
    ----------
    timeout_s
        How long to wait for replies in all, above 0. What has arrived by then is yielded still.
    buffer
        Replies held at once, at least 1.
    sleep
        Waits between two looks, for seconds.
    """
    deadline = time.monotonic() + timeout_s
    rest, waiting, arrived = iter(messages), deque[str](), dict[str, Message]()
    while chunk := list(islice(rest, buffer)):
        waiting.extend(_push(grid, chunk))
        if isinstance(grid, InProcessGrid):
            break
    while waiting:
        late = time.monotonic() >= deadline
        window = [name for name in islice(waiting, buffer) if name not in arrived]
        for reply in grid.pull_messages(window):
            arrived[reply.metadata.reply_to_message_id] = reply
        turns = 0
        while waiting and (waiting[0] in arrived or (late and turns < buffer)):
            turns += 1
            name = waiting.popleft()
            if name in arrived:
                yield arrived.pop(name)
            waiting.extend(_push(grid, islice(rest, 1)))
        if not turns:
            sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))


def _push(grid: Grid, messages: Iterable[Message]) -> list[str]:
    """Send messages and return their ids; one that could not be sent has none."""
    chosen = list(messages)
    return [name for name in grid.push_messages(chosen) if name] if chosen else []
