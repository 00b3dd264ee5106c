"""Bodies that never end, sent to a real fence and SuperLink: what they hold, and for how long."""

import shutil
import socket
import ssl
import threading
import time
from contextlib import ExitStack

import psutil
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from deployment_factories import NODES, signed
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]
CONNECTIONS, BODY, PIECE = 40, 31_000_000, b"\0" * 1_000_000
MB = 2**20


@pytest.fixture(
    scope="module",
    params=[
        "built-in",
        pytest.param(
            "nginx",
            marks=pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed"),
        ),
    ],
)
def fence(request):
    return request.param


@pytest.fixture
def phone(credentials):
    return load_ssh_private_key(credentials.node_key(NODES[0].name).read_bytes(), None)


class Withheld:
    """A connection that sends a body but for its last byte."""

    def __init__(self, deployment, headers):
        context = ssl.create_default_context(cafile=deployment.credentials.ca)
        plain = socket.create_connection(("127.0.0.1", deployment.fence_port), timeout=15)
        self.socket = context.wrap_socket(plain, server_hostname="localhost")
        lines = [
            "POST /v1/fleet/push-object HTTP/1.1",
            "host: localhost",
            f"content-length: {BODY}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.thread = threading.Thread(target=self._send, args=["\r\n".join(lines) + "\r\n\r\n"])
        self.thread.start()

    def _send(self, head):
        try:
            self.socket.sendall(head.encode())
            for _ in range(BODY // len(PIECE) - 1):
                self.socket.sendall(PIECE)
            self.socket.sendall(PIECE[:-1])
        except OSError:  # turned away, or not read any more
            return

    def close(self):
        self.socket.close()
        self.thread.join(20)


def memory(deployment):
    """Return the resident memory of the server's processes, in bytes."""
    total = 0
    for process in deployment.processes.values():
        for part in (psutil.Process(process.pid), *psutil.Process(process.pid).children(True)):
            total += part.memory_info().rss
    return total


def flood(deployment, headers):
    """Hold the connections for 20 s; return by how many bytes the servers' memory grew at most."""
    before, peak = memory(deployment), 0
    with ExitStack() as stack:
        held = [Withheld(deployment, headers) for _ in range(CONNECTIONS)]
        for one in held:
            stack.callback(one.close)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            peak = max(peak, memory(deployment))
            time.sleep(0.1)
        assert activates(deployment)
    return peak - before


def activates(deployment):
    """Whether another node is still let in and out."""
    laptop = load_ssh_private_key(deployment.credentials.node_key(NODES[1].name).read_bytes(), None)
    public = laptop.public_key()
    with FleetHttpClient.from_server_address(
        f"127.0.0.1:{deployment.fence_port}",
        insecure=False,
        root_certificates=str(deployment.credentials.ca),
        interceptors=[NodeAuthHttpInterceptor(laptop, public)],
    ) as client:
        request = ActivateNodeRequest(
            public_key=public_key_to_bytes(public), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        node_id = client.ActivateNode(request).node_id
        client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    return node_id != 0


def test_without_a_signature_no_body_is_kept(deployment):
    assert flood(deployment, {}) < 50 * MB


def test_with_a_strangers_signature_no_body_is_kept(deployment, foreign_credentials):
    stranger = load_ssh_private_key(foreign_credentials.node_key(NODES[0].name).read_bytes(), None)
    assert flood(deployment, signed(stranger)) < 50 * MB


def test_a_registered_node_holds_no_more_than_its_share(deployment, phone):
    assert flood(deployment, signed(phone)) < 250 * MB
