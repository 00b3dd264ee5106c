import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from hafl_app.deployment import credentials as credentials_module
from hafl_app.deployment.credentials import CredentialsError, make_credentials
from hafl_app.deployment.credentials_command import main

ROOT = Path(__file__).parents[2]
HOSTS, NODES = ("fl.example.org", "192.0.2.7"), ("phone", "laptop-2")


@pytest.fixture
def made(tmp_path):
    return make_credentials(tmp_path / "set", HOSTS, NODES, days=30)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def server_certificate(made):
    return x509.load_pem_x509_certificate(made.server_certificate.read_bytes())


class TestFiles:
    def test_private_keys_are_closed_to_others_and_the_folder_too(self, made):
        keys = sorted(path.name for path in made.folder.rglob("*.key"))
        assert keys == ["ca.key", "laptop-2.key", "phone.key", "server.key"]
        assert {mode(path) for path in made.folder.rglob("*.key")} == {0o600}
        assert mode(made.folder) == mode(made.folder / "nodes") == 0o700

    def test_a_key_is_never_open_to_others_while_it_is_written(self, tmp_path, monkeypatch):
        modes = []
        real_fdopen = os.fdopen

        def fdopen(descriptor, *arguments, **options):
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
            return real_fdopen(descriptor, *arguments, **options)

        monkeypatch.setattr(credentials_module.os, "fdopen", fdopen)
        before = os.umask(0)
        try:
            make_credentials(tmp_path / "set", HOSTS, NODES, days=30)
        finally:
            os.umask(before)
        assert modes == [0o600] * 4

    def test_an_existing_folder_is_refused_and_left_as_it_is(self, made, tmp_path):
        before = {path: path.read_bytes() for path in made.folder.rglob("*.*") if path.is_file()}
        with pytest.raises(CredentialsError, match="never overwritten"):
            make_credentials(made.folder, HOSTS, NODES, days=30)
        (tmp_path / "empty").mkdir()
        with pytest.raises(CredentialsError, match="never overwritten"):
            make_credentials(tmp_path / "empty", HOSTS, NODES, days=30)
        assert {path: path.read_bytes() for path in before} == before

    def test_a_failure_half_way_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(*arguments):
            raise OSError("no space left on device")

        monkeypatch.setattr(credentials_module, "server_certificate", fail)
        with pytest.raises(OSError, match="no space"):
            make_credentials(tmp_path / "set", HOSTS, NODES, days=30)
        assert list(tmp_path.iterdir()) == []


class TestCertificates:
    def test_the_server_has_the_given_names_and_those_of_the_loopback(self, made):
        names = server_certificate(made).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        assert names.value.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
        assert names.value.get_values_for_type(x509.IPAddress) == [
            ip_address(text) for text in ("192.0.2.7", "127.0.0.1", "::1")
        ]

    def test_the_server_is_signed_by_the_ca_and_signs_nobody(self, made):
        ca = x509.load_pem_x509_certificate(made.ca.read_bytes())
        server = server_certificate(made)
        server.verify_directly_issued_by(ca)
        basic = [c.extensions.get_extension_for_class(x509.BasicConstraints) for c in (ca, server)]
        assert [b.value.ca for b in basic] == [True, False]

    def test_they_are_valid_from_now_for_the_given_days(self, made):
        server, now = server_certificate(made), datetime.now(UTC)
        assert server.not_valid_before_utc < now
        assert abs(server.not_valid_after_utc - now - timedelta(days=30)) < timedelta(minutes=5)

    def test_flower_takes_the_keys_of_a_node_and_they_are_a_pair(self, made):
        private = load_ssh_private_key(made.node_key("phone").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        public = try_load_public_key(made.node_public_key("phone"))
        assert public == public_key_to_bytes(private.public_key())
        assert public != try_load_public_key(made.node_public_key("laptop-2"))


class TestValues:
    @pytest.mark.parametrize("name", ["", "../ca", "a/b", ".hidden", "-n", "a b", "x" * 64, "ä"])
    def test_a_name_that_is_no_file_name_is_refused(self, tmp_path, name):
        with pytest.raises(CredentialsError, match="letters, digits"):
            make_credentials(tmp_path / "set", HOSTS, ["phone", name], days=30)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("nodes", [[], ["phone", "phone"], ["phone", "Phone"]])
    def test_nodes_have_different_names(self, tmp_path, nodes):
        with pytest.raises(CredentialsError, match=r"expected (different|at least one)"):
            make_credentials(tmp_path / "set", HOSTS, nodes, days=30)

    @pytest.mark.parametrize(
        "host", ["", "10.0.0.300", "https://fl.org", "fl.org:8000", "-a.org", "a..b", "*.org"]
    )
    def test_a_host_is_a_name_or_an_address(self, tmp_path, host):
        with pytest.raises(CredentialsError, match="name or an IP address"):
            make_credentials(tmp_path / "set", [host], NODES, days=30)

    @pytest.mark.parametrize("days", [-1, 0, 3651])
    def test_days_have_a_range(self, tmp_path, days):
        with pytest.raises(CredentialsError, match="expected 1 to 3650"):
            make_credentials(tmp_path / "set", HOSTS, NODES, days)


class TestCommand:
    def test_it_says_what_belongs_where_and_refuses_the_second_time(self, tmp_path, capsys):
        arguments = [str(tmp_path / "set"), "--node", "phone", "--host", "fl.example.org"]
        assert main(arguments) == 0
        assert "nodes/phone.key" in capsys.readouterr().out
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_it_starts_without_torch(self, tmp_path):
        program = (
            "import sys; from hafl_app.deployment import deploy_local, credentials_command, fence; "
            "sys.exit('torch' in sys.modules)"
        )
        assert (
            subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
        )
