"""Connections to a server of the fence's kind, on the loopback."""

import asyncio
import contextlib
import socket

import pytest
import uvicorn

from hafl_app.deployment.connections import BoundedConnection


class Quick(BoundedConnection):
    most, most_per_address, quiet_s = 4, 4, 0.4


async def app(scope, receive, send):
    if scope["type"] == "http":
        await asyncio.sleep(0.8 if scope["path"] == "/slow" else 0)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"well"})


@contextlib.asynccontextmanager
async def serving():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=Quick, ws="none", log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()
        server.should_exit = True
        await task


async def answer(address, text):
    """Send, and return all that comes until the server closes; that must be soon."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(text)
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(3):
            return await reader.read()
    return b""


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nhost: x\r\n", b""),
        (b"GET / HTTP/1.1\r\nhost: x\r\nlong: " + b"x" * 70_000, b"HTTP/1.1 400"),
        (b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n", b"HTTP/1.1 200"),  # an answer is waited for
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n", b"HTTP/1.1 200"),
    ],
    ids=["silence", "half a head", "endless head", "slow answer", "half a body"],
)
def test_a_connection_that_brings_no_request_ends(text, start):
    async def run():
        async with serving() as address:
            return await answer(address, text)

    assert asyncio.run(run())[:12] == start


def test_one_too_many_is_closed_and_the_others_go_on():
    async def run():
        async with serving() as address:
            others = [await asyncio.open_connection(*address) for _ in range(4)]
            refused = await answer(address, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            reader, writer = others[0]
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            return refused, await reader.read(12)

    assert asyncio.run(run()) == (b"", b"HTTP/1.1 200")
