"""Three nodes of different rank, and nginx as the documentation sets it up."""

import base64
import re
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from hafl_app.deployment.local import LocalNode
from hafl_app.engines.processes import comes_up, free_port, start_process


def signed(private_key, at=None):
    """Return the headers of a call that a node signs, now or at another time."""
    timestamp = (at or datetime.now(UTC)).isoformat()
    key = public_key_to_bytes(private_key.public_key())
    return {
        "flwr-public-key": base64.b64encode(key).decode(),
        "flwr-signature": base64.b64encode(sign_message(private_key, timestamp.encode())).decode(),
        "flwr-timestamp": timestamp,
    }


NODES = (LocalNode("phone", 2), LocalNode("laptop", 4), LocalNode("server", 8))
NAMES = [node.name for node in NODES]
DOCS = Path(__file__).parents[2] / "docs" / "deploying.md"


def nginx_of_docs():
    """Return the configuration that docs/deploying.md gives."""
    return re.search(r"```nginx\n(.*?)```", DOCS.read_text(), re.DOTALL).group(1)


def start_verifier(deployment, port):
    """Start what nginx asks who makes a call."""
    command = [
        *("env", f"PYTHONPATH={DOCS.parents[1]}", sys.executable),
        *("-m", "hafl_app.deployment.verifier", "--ca", str(deployment.credentials.ca)),
        *("--superlink", f"127.0.0.1:{deployment.superlink_port}", "--port", str(port)),
    ]
    process = start_process(command, deployment.environment, deployment.logs / "verifier.log")
    deployment.processes["verifier"] = process
    assert comes_up(process, f"http://127.0.0.1:{port}/health")


def start_nginx(deployment):
    """Start nginx as in docs/deploying.md, on this deployment's ports and files."""
    verifier_port = free_port()
    start_verifier(deployment, verifier_port)
    site = nginx_of_docs()
    for documented, here in {
        "127.0.0.1:8000": f"127.0.0.1:{deployment.superlink_port}",
        "127.0.0.1:8444": f"127.0.0.1:{verifier_port}",
        "listen 8443": f"listen 127.0.0.1:{deployment.fence_port}",
        "/etc/hafl": str(deployment.credentials.folder),
    }.items():
        assert documented in site
        site = site.replace(documented, here)
    folder = deployment.home / "nginx"
    folder.mkdir()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}{site}}}\n"
    )
    command = [shutil.which("nginx"), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    deployment.start_server("nginx", command, deployment.fence_port)
