"""The fence in this process, before a stand-in for the SuperLink that notes what reaches it."""

import re
from base64 import b64encode
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from deployment_factories import nginx_of_docs, signed
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.main import create_app
from starlette.testclient import TestClient

from hafl_app.deployment.body_limits import BodyLimits
from hafl_app.deployment.fence import NODE_CALLS, fence
from hafl_app.deployment.verifier import verifier

KEY, OTHER_KEY = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
LIST_NODES = b"/v1/control/list-nodes"
SELF_SERVICE = {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}


@pytest.fixture(scope="module")
def superlink_routes():
    return {
        (method, path)
        for path, operations in create_app().openapi()["paths"].items()
        for method in (name.upper() for name in operations)
    }


class Superlink:
    """Answers every request and keeps what it was sent."""

    def __init__(self):
        self.seen, self.times_asked = [], 0
        self.status, self.body = 200, b"reply"
        self.registered = {KEY: "online"}

    async def handle(self, request):
        if request.url.raw_path == LIST_NODES:
            self.times_asked += 1
            return httpx.Response(200, content=self._nodes().SerializeToString())
        self.seen.append((request.method, request.url.raw_path, request.headers, request.content))
        return httpx.Response(self.status, content=self._stream(), headers={"x-flwr": "1"})

    def _nodes(self):
        return ListNodesResponse(
            nodes_info=[
                NodeInfo(public_key=public_key_to_bytes(key.public_key()), status=status)
                for key, status in self.registered.items()
            ]
        )

    async def _stream(self):
        yield self.body


class Transport(httpx.MockTransport):
    """Reads the streamed body, as a server would."""

    async def handle_async_request(self, request):
        await request.aread()
        return await super().handle_async_request(request)


@pytest.fixture
def superlink():
    return Superlink()


@contextmanager
def fenced(superlink, **limits):
    app = fence("superlink:1", transport=Transport(superlink.handle), limits=BodyLimits(**limits))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(superlink):
    with fenced(superlink) as client:
        yield client


@pytest.fixture
def nodes_client(client):
    """Return a client whose calls a registered node has signed."""
    client.headers.update(signed(KEY))
    return client


class TestRoutes:
    def test_nodes_calls_are_those_of_flower_without_self_service(self, superlink_routes):
        fleet = {path for _, path in superlink_routes if path.startswith("/v1/fleet/")}
        assert {f"/v1/fleet/{call}" for call in NODE_CALLS} == fleet - SELF_SERVICE

    def test_nginx_of_the_docs_lets_the_same_through(self):
        (calls,) = re.findall(r"\(\?<call>(.*?)\)\$", nginx_of_docs())
        assert calls.split("|") == list(NODE_CALLS)

    def test_nothing_else_of_the_superlink_is_reached(self, client, superlink, superlink_routes):
        allowed = {("POST", f"/v1/fleet/{call}") for call in NODE_CALLS}
        allowed |= {("GET", "/health"), ("HEAD", "/health")}
        refused = superlink_routes - allowed | {("GET", "/docs"), ("GET", "/openapi.json")}
        assert len([path for _, path in refused if path.startswith("/v1/control/")]) > 20
        for method, path in sorted(refused):
            assert client.request(method, path).status_code in {404, 405}, path
        assert superlink.seen == []

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/fleet/../control/start-run",
            "/v1/fleet/pull-messages/../../control/start-run",
            "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2fstart-run",
            "/v1/fleet/pull-messages/",
            "//v1/fleet/pull-messages",
            "/v1/control/start-run?/v1/fleet/pull-messages",
            "/v1/fleet",
        ],
    )
    def test_no_spelling_of_a_path_gets_round_it(self, client, superlink, path):
        request = httpx.Request("POST", "http://testserver/")
        request.url = request.url.copy_with(raw_path=path.encode())
        assert client.send(request).status_code == 404
        assert superlink.seen == []

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "CONNECT"])
    def test_other_methods_are_refused(self, client, superlink, method):
        assert client.request(method, "/v1/fleet/pull-messages").status_code == 405
        assert superlink.seen == []


class TestForwarding:
    def test_a_nodes_call_arrives_with_its_signature_and_body(self, client, superlink):
        headers_of_node = signed(KEY)
        reply = client.post(
            "/v1/fleet/push-object?x=1", headers=headers_of_node, content=b"\0body" * 999
        )

        ((method, path, headers, content),) = superlink.seen
        assert (method, path, content) == ("POST", b"/v1/fleet/push-object", b"\0body" * 999)
        assert {name: headers[name] for name in headers_of_node} == headers_of_node
        assert (reply.content, reply.headers["x-flwr"]) == (b"reply", "1")

    def test_refusals_of_the_superlink_come_through(self, nodes_client, superlink):
        superlink.status, superlink.body = 401, b"Invalid SuperNode authentication"
        reply = nodes_client.post("/v1/fleet/pull-messages", content=b"")
        assert (reply.status_code, reply.text) == (401, "Invalid SuperNode authentication")

    def test_headers_of_one_connection_stay_there(self, nodes_client, superlink):
        headers = {"connection": "x-mine", "x-mine": "1", "te": "trailers", "x-other": "2"}
        nodes_client.post("/v1/fleet/get-run", headers=headers, content=b"")
        _, _, arrived, _ = superlink.seen[0]
        assert "x-mine" not in arrived
        assert "te" not in arrived
        assert arrived["x-other"] == "2"
        assert arrived["host"] == "superlink:1"

    def test_a_superlink_that_is_down_is_a_502_which_nodes_retry(self):
        def down(request):
            raise httpx.ConnectError("refused")

        with TestClient(fence("superlink:1", transport=httpx.MockTransport(down))) as client:
            assert client.get("/health").status_code == 502
            reply = client.post("/v1/fleet/pull-messages", headers=signed(KEY))
            assert reply.status_code == 502  # 401 would end the node


class TestBodies:
    def test_one_that_is_too_long_is_refused(self, superlink):
        with fenced(superlink, body=1000) as client:
            client.headers.update(signed(KEY))
            assert client.post("/v1/fleet/push-object", content=b"x" * 1000).status_code == 200
            assert client.post("/v1/fleet/push-object", content=b"x" * 1001).status_code == 413
        assert len(superlink.seen) == 1

    def test_one_without_a_stated_length_is_refused(self, nodes_client, superlink):
        reply = nodes_client.post("/v1/fleet/push-object", content=iter([b"a", b"b"]))
        assert reply.status_code == 411
        assert superlink.seen == []


def unsigned(name):
    headers = signed(KEY)
    del headers[f"flwr-{name}"]
    return headers


def ago(seconds):
    return signed(KEY, datetime.now(UTC) - timedelta(seconds=seconds))


# Made when they are used: a signature is fresh for five minutes only.
FORGED = {
    "nothing": lambda: {},
    "no key": lambda: unsigned("public-key"),
    "no signature": lambda: unsigned("signature"),
    "no timestamp": lambda: unsigned("timestamp"),
    "no base64": lambda: signed(KEY) | {"flwr-public-key": "\x7f*"},
    "no key inside": lambda: signed(KEY) | {"flwr-public-key": "a2V5"},
    "another node's signature": lambda: (
        signed(OTHER_KEY) | {"flwr-public-key": signed(KEY)["flwr-public-key"]}
    ),
    "another time's signature": lambda: (
        signed(KEY) | {"flwr-timestamp": (datetime.now(UTC) + timedelta(seconds=1)).isoformat()}
    ),
    "old": lambda: ago(400),
    "from the future": lambda: ago(-400),
    "without a time zone": lambda: signed(KEY, datetime.now(UTC).replace(tzinfo=None)),
    "endless key": lambda: signed(KEY) | {"flwr-public-key": "A" * 10_000},
}


class TestSignatures:
    @pytest.fixture
    def verify(self, superlink):
        """Return the status that nginx gets for some headers."""
        app = verifier("superlink:1", transport=Transport(superlink.handle))
        with TestClient(app) as client:
            yield lambda headers: client.get("/verify", headers=headers).status_code

    @pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
    def test_who_is_no_registered_node_is_refused_before_the_body_is_read(
        self, client, superlink, forge, verify
    ):
        headers = forge()
        reply = client.post("/v1/fleet/push-object", headers=headers, content=b"x" * 99)
        assert (reply.status_code, reply.text) == (401, "Invalid SuperNode authentication")
        assert superlink.seen == []
        assert verify(headers) == 401

    def test_a_key_of_another_kind_is_refused(self, verify):
        key = ed25519.Ed25519PrivateKey.generate().public_key()
        headers = signed(KEY)
        stolen = headers | {"flwr-public-key": b64encode(public_key_to_bytes(key)).decode()}
        assert (verify(headers), verify(stolen)) == (204, 401)

    def test_a_node_may_come_as_soon_as_it_is_registered(self, verify, superlink):
        assert verify(signed(OTHER_KEY)) == 403
        superlink.registered[OTHER_KEY] = "registered"
        assert verify(signed(OTHER_KEY)) == 204

    def test_a_key_that_was_unregistered_is_refused(self, verify, superlink):
        superlink.registered[KEY] = "unregistered"
        assert verify(signed(KEY)) == 403

    def test_an_unregistered_node_gets_flowers_own_error_before_its_body_is_read(
        self, client, superlink
    ):
        reply = client.post("/v1/fleet/activate-node", headers=signed(OTHER_KEY), content=b"x")
        spec = API_ERROR_MAP[ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED]
        assert reply.status_code == spec.http_status_code
        error = FlowerError.from_json(reply.text)
        assert (error.code, error.message) == (2004, spec.public_message)
        assert superlink.seen == []

    def test_known_keys_are_not_asked_for_again(self, verify, superlink):
        assert [verify(signed(KEY)) for _ in range(5)] == [204] * 5
        assert superlink.times_asked == 1

    def test_a_long_refused_body_ends_its_connection_and_a_short_one_does_not(self, client):
        long, short = (
            client.post("/v1/fleet/push-object", content=b"x" * n) for n in (70_000, 60_000)
        )
        assert long.headers["connection"] == "close"
        assert "connection" not in short.headers
