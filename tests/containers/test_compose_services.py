"""The services of compose.yaml work together; done without a container engine."""

from pathlib import Path

import pytest
import yaml

from hafl_app.deployment.credentials import make_credentials
from hafl_app.deployment.local import local_deployment
from hafl_app.engines.processes import free_port, start_process

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]


def test_the_services_of_compose_find_each_other(tmp_path):
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    nodes = ("phone", "laptop", "workstation")
    credentials = make_credentials(tmp_path / "credentials", ["server"], nodes, days=1)
    with local_deployment(credentials, tmp_path / "logs") as deployment:
        places = {
            "=8000": f"={deployment.superlink_port}",
            "127.0.0.1:8000": f"127.0.0.1:{deployment.superlink_port}",
            "=8443": f"={deployment.fence_port}",
            "0.0.0.0": "127.0.0.1",
            "server:8443": f"127.0.0.1:{deployment.fence_port}",
            "/state": str(tmp_path),
            "/run/secrets": str(credentials.folder),
        }
        places |= {f"secrets/{n}.key": f"secrets/nodes/{n}.key" for n in nodes}

        def command(service):
            words = services[service]["command"]
            for there, here in reversed(places.items()):
                words = [word.replace(there, here) for word in words]
            return words

        config = yaml.safe_load((ROOT / "compose.yaml").read_text())["configs"]["connection"]
        text = config["content"].replace("/run/secrets", str(credentials.folder))
        text = text.replace("8000", str(deployment.superlink_port))
        (deployment.home / "config.toml").write_text(text)
        deployment.environment["PYTHONPATH"] = str(ROOT)
        deployment.start_server("superlink", command("superlink"), deployment.superlink_port)
        deployment.start_server("fence", command("fence"), deployment.fence_port)
        for node in nodes:
            deployment.register(node)
            deployment.processes[node] = start_process(
                [*command(node), f"--port={free_port()}"],
                deployment.environment | {"FLWR_HOME": str(deployment.home / node)},
                tmp_path / "logs" / f"{node}.log",
            )

        deployment.wait_online(len(nodes))
