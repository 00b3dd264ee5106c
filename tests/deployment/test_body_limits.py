"""Room for bodies, and how slowly they may come."""

import asyncio
import time

import pytest
from starlette.exceptions import HTTPException

from hafl_app.deployment.body_limits import BodyLimits, BodyRoom, in_time

PHONE, LAPTOP = b"phone", b"laptop"


def collect(pieces, size, limits):
    async def run():
        return [piece async for piece in in_time(pieces, size, limits)]

    return asyncio.run(run())


async def coming(pieces, pause_s):
    for piece in pieces:
        await asyncio.sleep(pause_s)
        yield piece


class TestRoom:
    def test_a_body_waits_for_room_and_then_gets_it(self):
        async def run():
            room, order = BodyRoom(BodyLimits(body=6, node=7, total=10)), []

            async def body(node, size, seconds):
                async with room.reserve(node, size):
                    order.append(("in", node, size))
                    await asyncio.sleep(seconds)
                order.append(("out", node, size))

            await asyncio.gather(body(PHONE, 6, 0.1), body(PHONE, 2, 0.0), body(LAPTOP, 4, 0.2))
            return order

        # The phone's second body waits for its first; the laptop's has room beside it.
        assert asyncio.run(run()) == [
            *(("in", PHONE, 6), ("in", LAPTOP, 4), ("out", PHONE, 6)),
            *(("in", PHONE, 2), ("out", PHONE, 2), ("out", LAPTOP, 4)),
        ]

    @pytest.mark.parametrize(("node", "size"), [(PHONE, 2), (LAPTOP, 5)])
    def test_without_room_in_time_it_is_a_503_which_nodes_retry(self, node, size):
        async def run():
            room = BodyRoom(BodyLimits(body=6, node=7, total=10, turn_s=0.05))
            async with room.reserve(PHONE, 6):
                with pytest.raises(HTTPException) as caught:
                    await room.reserve(node, size).__aenter__()
            async with room.reserve(node, size):  # what was waited for in vain is not kept
                return caught.value.status_code

        assert asyncio.run(run()) == 503

    def test_a_nodes_calls_are_counted_while_they_last(self):
        async def run():
            room = BodyRoom(BodyLimits(node_calls=1))
            async with room.call(PHONE), room.call(LAPTOP):
                with pytest.raises(HTTPException, match="503"):
                    await room.call(PHONE).__aenter__()
            async with room.call(PHONE):
                return True

        assert asyncio.run(run())


class TestSpeed:
    LIMITS = BodyLimits(window_s=0.3, window_bytes=4, body_s=2.0)

    def test_a_body_that_keeps_coming_arrives(self):
        pieces = [b"abcd", b"efgh", b"ijkl", b"m"]
        assert collect(coming(pieces, 0.1), 13, self.LIMITS) == pieces

    @pytest.mark.parametrize(
        ("pieces", "pause_s"),
        [([b"x" * 99, b""], 5.0), ([b"x" * 12] + [b"y"] * 50, 0.1)],
        ids=["stopped", "drop by drop"],
    )
    def test_one_that_comes_too_slowly_is_a_503(self, pieces, pause_s):
        started = time.monotonic()
        with pytest.raises(HTTPException, match="too slowly") as caught:
            collect(coming(pieces, pause_s), 100, self.LIMITS)
        assert caught.value.status_code == 503
        assert time.monotonic() - started < 1.5

    def test_the_whole_body_has_its_time_as_well(self):
        limits = BodyLimits(window_s=0.3, window_bytes=4, body_s=0.5)
        with pytest.raises(HTTPException, match="too slowly"):
            collect(coming([b"abcd"] * 20, 0.1), 80, limits)

    def test_a_superlink_that_is_slow_to_take_it_is_not_the_nodes_fault(self):
        async def run():
            taken = []
            async for piece in in_time(coming([b"a"] * 4, 0.01), 4, self.LIMITS):
                await asyncio.sleep(0.2)
                taken.append(piece)
            return taken

        assert asyncio.run(run()) == [b"a"] * 4
