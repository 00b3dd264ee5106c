"""Serving: on the loopback unless told otherwise, refusals in one line, an end by a signal."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from programs import ROOT
from run_folders import write_run
from starlette.testclient import TestClient

from hafl_app.commands.main import main
from hafl_app.dashboard.app import dashboard
from hafl_app.dashboard.server import _hosts, _is_loopback


def said(capsys, *arguments):
    code = main(["dashboard", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.err


class TestRefusals:
    def test_a_missing_folder(self, capsys, tmp_path):
        code, err = said(capsys, tmp_path / "none")
        assert code == 2
        assert err == (
            f"error: {tmp_path}/none: no such folder; expected one with runs, such as outputs\n"
        )

    def test_a_port_that_is_taken(self, capsys, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            code, err = said(capsys, tmp_path, "--port", port)
        assert code == 1
        assert err.count("\n") == 1
        assert f"--host 127.0.0.1 --port {port}: Address already in use" in err

    def test_every_address_without_a_name_that_is_asked_for(self, capsys, tmp_path):
        code, err = said(capsys, tmp_path, "--host", "0.0.0.0")
        assert code == 2
        assert err.startswith("error: --host 0.0.0.0: expected --name as well")

    def test_a_missing_fleet_file(self, capsys, tmp_path):
        code, err = said(capsys, tmp_path, "--fleet", tmp_path / "fleet.json")
        assert code == 2
        assert "no such file; the fence writes it" in err

    @pytest.mark.parametrize("port", ["x", "-1", "70000"])
    def test_a_port_that_is_none(self, capsys, tmp_path, port):
        assert said(capsys, tmp_path, f"--port={port}")[0] == 2


def test_hosts_are_those_that_were_named():
    assert _hosts("127.0.0.1", []) == ["localhost", "127.0.0.1", "127.0.0.1"]
    assert "fl.example.org" in _hosts("0.0.0.0", ["fl.example.org"])
    assert "*" not in _hosts("0.0.0.0", ["fl.example.org"])


def test_the_loopback_of_ipv6_is_answered_too(tmp_path):
    app = dashboard(tmp_path, _hosts("::1", []))
    client = TestClient(app, base_url="http://127.0.0.1")
    assert client.get("/", headers={"host": "[::1]:8050"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_the_loopback_is_known(host):
    assert _is_loopback(host)
    assert not _is_loopback("192.168.0.1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_stopped(tmp_path, number):
    write_run(tmp_path / "one")
    command = "import sys; from hafl_app.commands.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "dashboard", str(tmp_path), "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line).group()
        assert "one" in httpx.get(address, trust_env=False).text
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
