"""Dockerfile and compose.yaml are sound, as far as that shows without a container engine."""

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from hafl_app.deployment.credentials import Credentials

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "compose.yaml").read_text()
BIN = Path(sys.executable).parent


def lint(tool: str, text: str, folder: Path):
    file = folder / ("Dockerfile" if tool == "hadolint" else "compose.yaml")
    file.write_text(text)
    options = {
        "hadolint": ["--no-color", "--failure-threshold", "warning"],
        "check-jsonschema": ["--builtin-schema", "vendor.compose-spec"],
    }
    return subprocess.run(
        [BIN / tool, *options[tool], file], capture_output=True, text=True, check=False
    )


class TestLinters:
    @pytest.mark.parametrize(
        ("tool", "text"), [("hadolint", DOCKERFILE), ("check-jsonschema", COMPOSE)]
    )
    def test_the_files_pass(self, tool, text, tmp_path):
        result = lint(tool, text, tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr

    @pytest.mark.parametrize(
        ("tool", "text", "old", "new", "complaint"),
        [
            ("hadolint", DOCKERFILE, "USER hafl", "USER root", "DL3002"),
            ("hadolint", DOCKERFILE, "base AS cpu-dep", "base AS", "unexpected"),
            ("check-jsonschema", COMPOSE, "restart: unless", "restarts: unless", "restarts"),
            ("check-jsonschema", COMPOSE, "service_healthy", "service_fine", "service_fine"),
        ],
    )
    def test_broken_ones_do_not(self, tool, text, old, new, complaint, tmp_path):
        assert old in text
        result = lint(tool, text.replace(old, new), tmp_path)
        assert result.returncode == 1
        assert complaint in result.stdout + result.stderr


class TestDockerfile:
    lines = re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines()  # continued ones as one

    def test_versions_are_those_of_the_constraints(self):
        commands = [c for line in self.lines for c in line.split("&&") if "pip install" in c]
        assert len(commands) == 6
        for command in commands:
            assert "--constraint constraints.txt" in command or "==" in command

    def test_it_does_not_run_as_root(self):
        targets = [line for line in self.lines if line.endswith((" AS cpu", " AS cuda"))]
        users = [line for line in self.lines if line.startswith("USER ")]
        assert users == ["USER hafl"] * len(targets)
        assert len(targets) == 2

    def test_what_it_copies_is_sent_to_the_build(self):
        copied = {
            source
            for line in self.lines
            if line.startswith("COPY ")
            for source in line.split()[1:-1]
        }
        assert {"hafl_app", "conf", "scripts", "pyproject.toml"} <= {p.rstrip("/") for p in copied}
        for source in copied:
            assert (ROOT / source).exists()
            assert sent_to_build(source)

    def test_its_entry_point_is_there(self):
        (entry,) = (line for line in self.lines if line.startswith("ENTRYPOINT "))
        *_, script = re.findall(r'"([^"]+)"', entry)
        assert (ROOT / script).is_file()
        assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0


def sent_to_build(path: str) -> bool:
    """Whether .dockerignore lets a file of the project into the build; the last match decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        if line.startswith("**/"):
            matches = any(fnmatch(part, pattern) for part in parts)
        else:
            matches = fnmatch(parts[0], pattern)
        if matches:
            sent = line.startswith("!")
    return sent


def test_the_build_gets_neither_data_nor_keys():
    for path in ("credentials/ca.key", "data/train.csv", ".git/config", "outputs/a/summary.json"):
        assert not sent_to_build(path)
    assert not sent_to_build("hafl_app/__pycache__/plan.pyc")


class TestCompose:
    parsed = yaml.safe_load(COMPOSE)
    services = parsed["services"]
    nodes = ("phone", "laptop", "workstation")

    def option(self, service, name):
        (value,) = (
            word.partition("=")[2]
            for word in self.services[service]["command"]
            if word.startswith(f"--{name}=")
        )
        return value

    def test_nothing_but_the_fence_is_reached_from_outside(self):
        assert self.option("superlink", "host") == "127.0.0.1"
        assert self.services["superlink"]["network_mode"] == "service:server"
        assert self.services["fence"]["network_mode"] == "service:server"
        ports = {name: s.get("ports") for name, s in self.services.items() if s.get("ports")}
        assert ports == {"server": ["${HAFL_PORT:-8443}:8443"]}
        assert self.option("fence", "port") == "8443"
        superlink = f"127.0.0.1:{self.option('superlink', 'port')}"
        assert self.option("fence", "superlink") == superlink
        assert superlink in self.parsed["configs"]["connection"]["content"]

    def test_secrets_are_what_make_credentials_makes(self):
        made = Credentials(Path("credentials"))
        known = {made.ca, made.server_certificate, made.server_key}
        for node in self.nodes:
            known |= {made.node_key(node), made.node_public_key(node)}
        secrets = self.parsed["secrets"]
        assert {Path(s["file"]) for s in secrets.values()} == known
        assert all(Path(s["file"]).name == name for name, s in secrets.items())

    @pytest.mark.parametrize("service", ["superlink", "fence", *nodes])
    def test_a_service_has_the_secrets_it_names_and_no_foreign_key(self, service):
        held = self.services[service]["secrets"]
        assert set(held) <= set(self.parsed["secrets"])
        named = [w.partition("/run/secrets/")[2] for w in self.services[service]["command"]]
        assert {name for name in named if name} <= set(held)
        own = "server.key" if service in ("superlink", "fence") else f"{service}.key"
        assert [name for name in held if name.endswith(".key")] == [own]

    def test_nodes_differ_in_rank_and_partition(self):
        configs = [self.option(node, "node-config") for node in self.nodes]
        for i, (config, rank) in enumerate(zip(configs, (2, 4, 8), strict=True)):
            assert config.startswith(f"partition-id={i} num-partitions=3 rank={rank} ")

    def test_one_node_has_a_gpu_and_a_profile_of_its_own(self):
        profiles = {n: s["profiles"] for n, s in self.services.items() if "profiles" in s}
        assert profiles == {"workstation": ["gpu"]}
        workstation = self.services["workstation"]
        assert workstation["build"]["target"] == "cuda"
        (device,) = workstation["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]

    def test_data_are_mounted_read_only(self):
        for service in ("superlink", *self.nodes):
            (data,) = (v for v in self.services[service]["volumes"] if isinstance(v, dict))
            assert (data["target"], data["read_only"]) == ("/data", True)

    def test_all_restart_and_those_that_serve_say_how_they_are(self):
        assert {s["restart"] for s in self.services.values()} == {"unless-stopped"}
        assert {n for n, s in self.services.items() if "healthcheck" not in s} == {"server"}
