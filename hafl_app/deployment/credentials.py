"""Credentials of a deployment: a certificate authority, a server certificate, a key per node.

Nodes know the server by `ca.crt`; the server knows a node by its registered public key. Flower
expects the nodes' keys on a NIST curve, in OpenSSH's encoding (`flwr supernode register`).
"""

import ipaddress
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from hafl_app.deployment.certificates import ca_certificate, server_certificate

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_DAYS = 3650
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# The last label is never all digits: 10.0.0.300 is a misspelled address, not a name.
_DNS_NAME = re.compile(rf"(?!.{{254}})(?:{_LABEL}\.)*(?!\d+$){_LABEL}")


class CredentialsError(ValueError):
    """Credentials that cannot be made as they were asked for."""


@dataclass(frozen=True)
class Credentials:
    """Paths of a set of credentials."""

    folder: Path

    @property
    def ca(self) -> Path:
        """Certificate that every device and the `flwr` command check the server by."""
        return self.folder / "ca.crt"

    @property
    def server_certificate(self) -> Path:
        """Certificate that the SuperLink and its fence show."""
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        """Private key of the server's certificate."""
        return self.folder / "server.key"

    def node_key(self, name: str) -> Path:
        """Return a node's private key, for its `--auth-supernode-private-key`."""
        return self.folder / "nodes" / f"{name}.key"

    def node_public_key(self, name: str) -> Path:
        """Return a node's public key, for `flwr supernode register`."""
        return self.folder / "nodes" / f"{name}.pub"


def make_credentials(
    folder: Path,
    hosts: Sequence[str],
    nodes: Sequence[str],
    days: int,
    *,
    keep_ca_key: bool = True,
) -> Credentials:
    """Make all keys and certificates of a deployment in a new folder: all of them, or none.

    Private keys are created with mode 0600 and the folder with 0700.

    Parameters
    ----------
    folder
        Must not exist yet.
    hosts
        Names and addresses under which devices reach the server; those of the loopback are added,
        because the SuperLink itself listens there.
    nodes
        Names of the nodes, at least one: letters, digits, `-` and `_`, at most 63.
    days
        Days that the certificates are valid, 1 to 3650. Nodes' keys do not expire.
    keep_ca_key
        Whether ``ca.key`` is written. Without it this authority can never sign again.

    Raises
    ------
    CredentialsError
        If a value is out of range, or the folder exists.
    """
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *LOOPBACK))]
    _check_nodes(nodes)
    if not 1 <= days <= MOST_DAYS:
        raise CredentialsError(f"days is {days}, expected 1 to {MOST_DAYS}")
    if os.path.lexists(folder):
        raise CredentialsError(f"{folder} exists: credentials are never overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that one rename makes the whole set appear. mkdtemp creates with mode 0700.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_all(Credentials(unfinished), names, nodes, days, keep_ca_key)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Credentials(folder)


def _write_all(
    files: Credentials,
    names: Sequence[x509.GeneralName],
    nodes: Sequence[str],
    days: int,
    keep_ca_key: bool,
) -> None:
    ca_key = ec.generate_private_key(ec.SECP256R1())
    server_key = ec.generate_private_key(ec.SECP256R1())
    ca = ca_certificate(ca_key, days)
    server = server_certificate(server_key, names, ca, ca_key, days)
    if keep_ca_key:
        _write_key(files.folder / "ca.key", ca_key)
    _write_key(files.server_key, server_key)
    files.ca.write_bytes(ca.public_bytes(Encoding.PEM))
    files.server_certificate.write_bytes(server.public_bytes(Encoding.PEM))
    (files.folder / "nodes").mkdir(mode=0o700)
    for name in nodes:
        key = ec.generate_private_key(ec.SECP384R1())
        _write_key(files.node_key(name), key)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        files.node_public_key(name).write_bytes(public + b" " + name.encode() + b"\n")


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    encoded = key.private_bytes(Encoding.PEM, _private_format(path), NoEncryption())
    # Created closed to others: narrowed later, it could be read in between.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(encoded)


def _private_format(path: Path) -> PrivateFormat:
    return PrivateFormat.OpenSSH if path.parent.name == "nodes" else PrivateFormat.PKCS8


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _DNS_NAME.fullmatch(host):
            raise CredentialsError(f"host {host!r}: expected a name or an IP address") from None
        return x509.DNSName(host)


def _check_nodes(nodes: Sequence[str]) -> None:
    if not nodes:
        raise CredentialsError("no node is named, expected at least one")
    for name in nodes:
        if not _NODE_NAME.fullmatch(name):
            raise CredentialsError(
                f"node {name!r}: expected 1 to 63 letters, digits, '-' and '_', a letter or digit "
                "first"
            )
    # Lower case: some file systems hold only one of Phone.key and phone.key.
    if len({name.lower() for name in nodes}) < len(nodes):
        raise CredentialsError(f"nodes {', '.join(nodes)}: expected different names")
