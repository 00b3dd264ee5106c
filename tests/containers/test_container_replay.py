"""The steps of the image and the services of compose.yaml work; done without a container engine."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

import pytest
import yaml
from dockerfile_stages import ROOT, Replay, steps_of
from running import TINY

from hafl_app.deployment.credentials import make_credentials
from hafl_app.deployment.local import local_deployment
from hafl_app.engines.processes import free_port, start_process

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]


def python_of_image(text: str) -> str:
    """Return the image's Python where it is installed, else this one."""
    version = re.search(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE).group(1)
    candidate = shutil.which(f"python{version}")
    # A version manager's stand-in for it may be on the path, and fail.
    if candidate and subprocess.run([candidate, "-V"], check=False).returncode == 0:
        return candidate
    return sys.executable


def torch_index() -> dict[str, str]:
    """Return the build argument for where torch's index is not reached: pip's own index."""
    steps = steps_of((ROOT / "Dockerfile").read_text(), "cpu")
    (default,) = (s.value for s in steps if s.value.startswith("TORCH_INDEX="))
    host = urllib.parse.urlparse(default.partition("=")[2]).hostname
    try:
        socket.create_connection((host, 443), 5).close()
    except OSError:
        return {"TORCH_INDEX": os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")}
    return {}


class TestImage:
    @pytest.fixture(scope="module")
    @classmethod
    def image(cls):
        text = (ROOT / "Dockerfile").read_text()
        with tempfile.TemporaryDirectory(prefix="hafl-image-") as folder:
            replay = Replay(Path(folder), python_of_image(text), torch_index())
            replay.run(steps_of(text, "cpu"))
            yield replay

    def test_only_making_the_user_is_left_out(self, image):
        assert len(image.skipped) == 1

    def test_torch_is_the_pinned_one_for_the_cpu(self, image):
        result = image.call("python", "-c", "import torch; print(torch.__version__)")
        (pinned,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
        assert result.stdout.strip() == f"{pinned}+cpu"

    def test_the_code_is_the_images_own(self, image):
        result = image.call("python", "-c", "import hafl_app.plan as p; print(p.__file__)")
        assert result.stdout.strip() == str(image.app / "hafl_app" / "plan.py"), result.stderr

    def test_the_entry_point_explains_itself(self, image):
        result = image.call(*image.entrypoint, "--help")
        assert result.returncode == 0, result.stderr
        assert "== Configuration groups ==" in result.stdout

    @pytest.mark.parametrize("program", ["flower-superlink", "flower-supernode", "flwr"])
    def test_the_entry_point_runs_flowers_programs(self, image, program):
        result = image.call(*image.entrypoint, program, "--version")
        assert result.returncode == 0, result.stderr
        assert "1.41" in result.stdout

    def test_it_simulates(self, image):
        result = image.call(*image.entrypoint, *TINY, "federation.num_rounds=1")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "round 1/1" in result.stdout
        assert list((image.app / "outputs").rglob("adapter/adapter_model.safetensors"))


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
