"""Three nodes of different rank, and nginx as the documentation sets it up."""

import re
import shutil
from pathlib import Path

from hafl_app.deployment.local import LocalNode

NODES = (LocalNode("phone", 2), LocalNode("laptop", 4), LocalNode("server", 8))
NAMES = [node.name for node in NODES]
DOCS = Path(__file__).parents[2] / "docs" / "deploying.md"


def nginx_of_docs():
    """Return the configuration that docs/deploying.md gives."""
    return re.search(r"```nginx\n(.*?)```", DOCS.read_text(), re.DOTALL).group(1)


def start_nginx(deployment):
    """Start nginx as docs/deploying.md says, on this deployment's ports and files."""
    site = nginx_of_docs()
    for documented, here in {
        "127.0.0.1:8000": f"127.0.0.1:{deployment.superlink_port}",
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
