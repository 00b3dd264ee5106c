"""Access at the public port of a real deployment: calls that are rejected, and others."""

import json
import shutil
import ssl

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from deployment_factories import NODES
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from hafl_app.engines.flower_run import CONNECTION
from hafl_app.engines.processes import free_port, start_process, tool

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]
PHONE = NODES[0]


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


def supernode(deployment, name, *arguments):
    """Run a SuperNode until it gives up; return its log."""
    log = deployment.logs / f"{name}.log"
    command = [
        *(tool("flower-supernode"), "--superlink", f"127.0.0.1:{deployment.fence_port}"),
        *("--port", str(free_port()), "--max-retries", "1", *arguments),
    ]
    process = start_process(command, deployment.environment, log)
    assert process.wait(timeout=60) != 0
    return log.read_text()


def key(credentials, name=PHONE.name):
    return load_ssh_private_key(credentials.node_key(name).read_bytes(), None)


def signed_client(deployment, private_key, public_key):
    return FleetHttpClient.from_server_address(
        f"127.0.0.1:{deployment.fence_port}",
        insecure=False,
        root_certificates=str(deployment.credentials.ca),
        interceptors=[NodeAuthHttpInterceptor(private_key, public_key)],
    )


def activation(public_key):
    return ActivateNodeRequest(
        public_key=public_key_to_bytes(public_key), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
    )


class TestNodes:
    def test_a_node_with_a_registered_key_is_let_in(self, deployment, credentials):
        private = key(credentials)
        with signed_client(deployment, private, private.public_key()) as client:
            node_id = client.ActivateNode(activation(private.public_key())).node_id
            assert deployment.num_online() == 1
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        assert deployment.num_online() == 0

    def test_an_unregistered_key_is_turned_away(self, deployment, foreign_credentials):
        log = supernode(
            *(deployment, "unregistered", "--root-certificates", str(deployment.credentials.ca)),
            *("--auth-supernode-private-key", str(foreign_credentials.node_key(PHONE.name))),
        )
        assert "[code: 2004] Failed to activate SuperNode." in log
        assert deployment.num_online() == 0

    def test_a_node_without_a_key_cannot_register_itself(self, deployment):
        log = supernode(
            deployment, "keyless", "--root-certificates", str(deployment.credentials.ca)
        )
        assert "Failed to initialize the connection" in log
        assert "404" in log

    def test_a_registered_key_without_its_private_half_is_turned_away(
        self, deployment, credentials, foreign_credentials
    ):
        stolen, own = key(credentials).public_key(), key(foreign_credentials)
        with (
            signed_client(deployment, own, stolen) as client,
            pytest.raises(httpx.HTTPStatusError, match="401"),
        ):
            client.ActivateNode(activation(stolen))
        assert deployment.num_online() == 0

    def test_a_node_that_trusts_another_ca_does_not_talk(self, deployment, foreign_credentials):
        log = supernode(
            *(deployment, "other-ca", "--root-certificates", str(foreign_credentials.ca)),
            *("--auth-supernode-private-key", str(deployment.credentials.node_key(PHONE.name))),
        )
        assert "CERTIFICATE_VERIFY_FAILED" in log
        assert deployment.num_online() == 0

    def test_a_plaintext_node_is_turned_away(self, deployment):
        log = supernode(deployment, "plaintext", "--insecure")
        assert "Failed to initialize the connection" in log
        assert deployment.num_online() == 0

    @pytest.mark.parametrize("port", ["fence_port", "superlink_port"])
    def test_a_plaintext_client_reaches_nothing_on_either_port(self, deployment, port):
        try:
            reply = httpx.get(f"http://127.0.0.1:{getattr(deployment, port)}/health")
        except httpx.TransportError:
            return
        assert (reply.status_code, "plain HTTP request" in reply.text) == (400, True)  # nginx


class TestControl:
    """Rights of a caller that holds only the CA certificate, with the `flwr` command."""

    @pytest.fixture
    def stranger(self, deployment, tmp_path):
        """Return the same command line, as seen from outside: it knows the fence's address."""
        (tmp_path / "config.toml").write_text(
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{deployment.fence_port}"\n'
            f"root-certificates = {json.dumps(str(deployment.credentials.ca))}\n"
        )
        inside = deployment.environment
        deployment.environment = inside | {"FLWR_HOME": str(tmp_path)}
        yield deployment
        deployment.environment = inside

    def listed(self, deployment, *command):
        result = deployment.flwr(*command, CONNECTION, "--format", "json")
        return json.loads(result.stdout)

    def test_no_key_of_a_stranger_is_registered(self, stranger, foreign_credentials):
        public = foreign_credentials.node_public_key("laptop")
        result = stranger.flwr("supernode", "register", str(public), CONNECTION)
        assert result.returncode != 0
        assert "404" in result.stdout or "Not Found" in result.stdout

    def test_no_run_of_a_stranger_starts(self, stranger, small_app):
        result = stranger.flwr("run", str(small_app), CONNECTION)
        assert "Successfully started run" not in result.stdout
        assert "404" in result.stdout or "Not Found" in result.stdout

    @pytest.mark.parametrize("command", [("list",), ("supernode", "list")])
    def test_a_stranger_learns_nothing_of_runs_and_nodes(self, stranger, command):
        assert self.listed(stranger, *command)["success"] is False

    def test_the_operator_can_do_all_of_it(self, deployment, foreign_credentials, small_app):
        """So that the tests above fail if the fence lets everything through."""
        before = len(self.listed(deployment, "supernode", "list")["nodes"])
        public = foreign_credentials.node_public_key("laptop")
        assert deployment.flwr("supernode", "register", str(public), CONNECTION).returncode == 0
        assert len(self.listed(deployment, "supernode", "list")["nodes"]) == before + 1
        result = deployment.flwr("run", str(small_app), CONNECTION)
        assert "Successfully started run" in result.stdout
        run_id = result.stdout.split("Successfully started run")[1].split()[0]
        assert deployment.flwr("stop", run_id, CONNECTION).returncode == 0

    @pytest.fixture
    def small_app(self, tmp_path):
        """Return an app that does nothing."""
        folder = tmp_path / "app"
        folder.mkdir()
        (folder / "pyproject.toml").write_text(
            '[project]\nname = "small"\nversion = "1.0.0"\nlicense = "Apache-2.0"\n'
            '[tool.flwr.app]\npublisher = "nobody"\n[tool.flwr.app.components]\n'
            'serverapp = "small:server"\nclientapp = "small:client"\n'
        )
        (folder / "small.py").write_text(
            "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
            "server = ServerApp()\nclient = ClientApp()\n"
            "@server.main()\ndef main(grid, context):\n    pass\n"
        )
        return folder

    def test_the_runtime_interface_is_closed_as_well(self, deployment):
        context = ssl.create_default_context(cafile=deployment.credentials.ca)
        headers = {"content-type": "application/x-protobuf"}
        path = "/v1/runtime/acquire-task"  # whoever gets the task gets the run
        inside, outside = (
            httpx.post(f"https://127.0.0.1:{port}{path}", headers=headers, verify=context)
            for port in (deployment.superlink_port, deployment.fence_port)
        )
        assert inside.status_code != 404
        assert outside.status_code == 404

    def test_the_superlink_listens_on_the_loopback_alone(self, deployment):
        process = psutil.Process(deployment.processes["superlink"].pid)
        listening = [
            connection.laddr
            for part in (process, *process.children(recursive=True))
            for connection in part.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert [(a.ip, a.port) for a in listening] == [("127.0.0.1", deployment.superlink_port)]
