"""The fence in this process, before a stand-in for the SuperLink that notes what reaches it."""

import re

import httpx
import pytest
from deployment_factories import nginx_of_docs
from flwr.superlink.main import create_app
from starlette.testclient import TestClient

from hafl_app.deployment import fence as fence_module
from hafl_app.deployment.fence import NODE_CALLS, fence

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
        self.seen = []
        self.status, self.body = 200, b"reply"

    async def handle(self, request):
        self.seen.append((request.method, request.url.raw_path, request.headers, request.content))
        return httpx.Response(self.status, content=self._stream(), headers={"x-flwr": "1"})

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


@pytest.fixture
def client(superlink):
    app = fence("superlink:1", transport=Transport(superlink.handle))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


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
        signed = {"flwr-public-key": "a2V5", "flwr-signature": "c2ln", "flwr-timestamp": "now"}
        reply = client.post("/v1/fleet/push-object?x=1", headers=signed, content=b"\0body" * 999)

        ((method, path, headers, content),) = superlink.seen
        assert (method, path, content) == ("POST", b"/v1/fleet/push-object", b"\0body" * 999)
        assert {name: headers[name] for name in signed} == signed
        assert (reply.content, reply.headers["x-flwr"]) == (b"reply", "1")

    def test_refusals_of_the_superlink_come_through(self, client, superlink):
        superlink.status, superlink.body = 401, b"Invalid SuperNode authentication"
        reply = client.post("/v1/fleet/pull-messages", content=b"")
        assert (reply.status_code, reply.text) == (401, "Invalid SuperNode authentication")

    def test_headers_of_one_connection_stay_there(self, client, superlink):
        headers = {"connection": "x-mine", "x-mine": "1", "te": "trailers", "x-other": "2"}
        client.post("/v1/fleet/get-run", headers=headers, content=b"")
        _, _, arrived, _ = superlink.seen[0]
        assert "x-mine" not in arrived
        assert "te" not in arrived
        assert arrived["x-other"] == "2"
        assert arrived["host"] == "superlink:1"

    def test_a_body_that_is_too_long_is_refused(self, client, monkeypatch):
        monkeypatch.setattr(fence_module, "MAX_BODY", 1000)
        assert client.post("/v1/fleet/push-object", content=b"x" * 1000).status_code == 200
        assert client.post("/v1/fleet/push-object", content=b"x" * 1001).status_code == 413

    def test_a_superlink_that_is_down_is_a_502_which_nodes_retry(self):
        def down(request):
            raise httpx.ConnectError("refused")

        with TestClient(fence("superlink:1", transport=httpx.MockTransport(down))) as client:
            assert client.post("/v1/fleet/pull-messages").status_code == 502
