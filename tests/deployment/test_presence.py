"""Who is connected and when each was last heard, as the fence sees calls and connections."""

import asyncio
import contextlib
import json
import logging
import socket

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from deployment_factories import signed
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from hafl_app.deployment.connections import BoundedConnection
from hafl_app.deployment.fence import fence
from hafl_app.deployment.presence import Presence, keep_written
from hafl_app.deployment.registered_keys import RegisteredNode

KEY = ec.generate_private_key(ec.SECP384R1())
PUBLIC = public_key_to_bytes(KEY.public_key())
PHONE, LAPTOP = RegisteredNode(7, "phone"), RegisteredNode(8, "laptop")


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


class TestPresence:
    def test_calls_and_connections_of_a_node(self, clock):
        presence = Presence(clock)
        presence.called(b"phone", "pull-messages")
        presence.holds(b"phone", 1)
        clock.now = 103.0
        presence.called(b"phone", "push-messages")
        presence.holds(b"phone", 2)
        presence.lost(b"phone", 1)
        phone, laptop = self.nodes(presence)
        assert phone == {
            **{"node_id": 7, "name": "phone", "connected": True, "closed": None},
            **{"last_call": 103.0, "call": "push-messages"},
        }
        assert (laptop["connected"], laptop["last_call"]) == (False, None)
        clock.now = 104.0
        presence.lost(b"phone", 2)
        phone, _ = self.nodes(presence)
        assert (phone["connected"], phone["closed"]) == (False, 104.0)

    def nodes(self, presence):
        said = presence.to_json({b"phone": PHONE, b"laptop": LAPTOP})
        assert said["written"] == presence._clock()
        return said["nodes"]

    def test_a_node_that_is_no_longer_registered_is_not_listed(self, clock):
        presence = Presence(clock)
        presence.called(b"phone", "pull-messages")
        assert [n["name"] for n in presence.to_json({b"laptop": LAPTOP})["nodes"]] == ["laptop"]


def test_a_disk_that_does_not_take_it_is_logged_once(tmp_path, clock, caplog, monkeypatch):
    monkeypatch.setattr("hafl_app.deployment.presence._WRITE_SECONDS", 0.01)
    # Once a server of uvicorn has run, its own logger passes nothing on.
    monkeypatch.setattr("hafl_app.deployment.presence._LOGGER", logging.getLogger("presence"))
    file = tmp_path / "none" / "fleet.json"

    async def run():
        task = asyncio.create_task(keep_written(Presence(clock), dict, file))
        await asyncio.sleep(0.3)
        file.parent.mkdir()
        async with asyncio.timeout(5):
            while not file.exists():
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())
    assert json.loads(file.read_text()) == {"written": 100.0, "nodes": []}
    assert len([r for r in caplog.records if "is not written" in r.message]) == 1


def superlink(request):
    if request.url.path == "/v1/control/list-nodes":
        node = NodeInfo(public_key=PUBLIC, status="online", node_id=7, name="phone")
        content = ListNodesResponse(nodes_info=[node]).SerializeToString()
        return httpx.Response(200, content=content)
    return httpx.Response(200, content=reply())


async def reply():
    yield b"reply"


class Transport(httpx.MockTransport):
    async def handle_async_request(self, request):
        await request.aread()
        return await super().handle_async_request(request)


@contextlib.asynccontextmanager
async def serving(file, connection=BoundedConnection):
    app = fence("superlink:1", transport=Transport(superlink), fleet=file)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            app, http=connection, ws="none", log_level="critical", timeout_keep_alive=1
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()
        server.should_exit = True
        await task


async def call(address, headers):
    """Call as a node does, and return the open connection with the status."""
    reader, writer = await asyncio.open_connection(*address)
    lines = ["POST /v1/fleet/pull-messages HTTP/1.1", "host: x", "content-length: 0"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    return reader, writer, int((await reader.readline()).split()[1])


async def until(file, condition, seconds=10):
    """Wait until the file says so of the one node."""
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(OSError, ValueError, IndexError):
                node = json.loads(file.read_text())["nodes"][0]
                if condition(node):
                    return node
            await asyncio.sleep(0.05)


class TestFence:
    def test_the_end_of_a_connection_is_seen_at_once(self, tmp_path):
        file = tmp_path / "fleet.json"

        async def run():
            async with serving(file) as address:
                _, writer, status = await call(address, signed(KEY))
                assert status == 200
                node = await until(file, lambda node: node["connected"])
                assert (node["node_id"], node["name"]) == (7, "phone")
                assert node["call"] == "pull-messages"
                writer.transport.abort()  # as a system does for a process that was killed
                node = await until(file, lambda node: not node["connected"], seconds=4)
                assert node["closed"] >= node["last_call"]

        asyncio.run(run())

    def test_a_nodes_connection_outlasts_its_silence_and_a_strangers_does_not(self, tmp_path):
        file = tmp_path / "fleet.json"

        async def run():
            async with serving(file) as address:
                nodes = await call(address, signed(KEY))  # dropped, its connection would end
                reader, _, status = await call(address, {})
                assert (nodes[2], status) == (200, 401)
                async with asyncio.timeout(5):
                    await reader.read()  # to the end: closed by the keep-alive of a second
                await asyncio.sleep(1.5)
                assert (await until(file, lambda node: True))["connected"]

        asyncio.run(run())

    def test_without_a_file_nothing_is_written(self, tmp_path):
        async def run():
            async with serving(None) as address:
                assert (await call(address, signed(KEY)))[2] == 200

        asyncio.run(run())
        assert not list(tmp_path.iterdir())
