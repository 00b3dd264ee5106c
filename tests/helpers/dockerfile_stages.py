"""Read a Dockerfile, and do its steps in a virtual environment instead of a container."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """One instruction with its arguments."""

    instruction: str
    value: str


def steps_of(text: str, target: str) -> list[Step]:
    """Return the steps that make a target, those of the stages below it first."""
    parsed = DockerfileParser(fileobj=BytesIO(text.encode())).structure
    stages: dict[str, list[Step]] = {"": []}
    stage = ""
    for line in parsed:
        if line["instruction"] == "COMMENT":
            continue
        if line["instruction"] == "FROM":
            parent, _, stage = re.split(r"\s+(as)\s+", line["value"], flags=re.IGNORECASE)
            # The arguments before the first FROM hold for all.
            stages[stage] = list(stages.get(parent, stages[""]))
        else:
            stages[stage].append(Step(line["instruction"], line["value"]))
    return stages[target]


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


@dataclass
class Replay:
    """The image's steps, done below a folder.

    ``/app`` and ``/state`` of the image are folders of the same name in ``folder``.
    """

    folder: Path
    python: str
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def app(self) -> Path:
        return self.folder / "app"

    def run(self, steps: list[Step]) -> None:
        """Do all steps; a command that fails ends it with its output."""
        subprocess.run([self.python, "-m", "venv", self.folder / "venv"], check=True)
        (self.folder / "app" / "outputs").mkdir(parents=True)
        (self.folder / "state" / "flower").mkdir(parents=True)
        for step in steps:
            getattr(self, f"_{step.instruction.lower()}")(step.value)

    def call(self, *command: str, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        """Run a command as the image would."""
        return subprocess.run(
            command,
            cwd=self.app,
            # What surrounds the tests is none of the image's business, but for pip's settings.
            env={k: v for k, v in os.environ.items() if k.startswith(("PIP_", "LANG"))}
            | self.arguments
            | self.environment
            | {"PATH": f"{self.folder / 'venv' / 'bin'}:/usr/bin:/bin", "HOME": os.environ["HOME"]},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        self.arguments.setdefault(name, default)

    def _env(self, value: str) -> None:
        pairs = dict(pair.split("=", 1) for pair in shlex.split(value))
        pairs.pop("PIP_NO_CACHE_DIR", None)  # to be quick, and kind to the index
        self.environment |= {k: self._here(v) for k, v in pairs.items()}

    def _run(self, value: str) -> None:
        if value.startswith("useradd"):
            self.skipped.append(value)  # needs root
            return
        result = self.call("bash", "-euc", value, timeout=1500)
        assert result.returncode == 0, f"{value}\n{result.stdout[-2000:]}{result.stderr[-4000:]}"

    def _copy(self, value: str) -> None:
        *sources, target = shlex.split(value)
        for source in sources:
            to = self.app / target / (source if target == "./" else "")
            if (ROOT / source).is_file():
                assert sent_to_build(source), f".dockerignore keeps {source} out"
                shutil.copyfile(ROOT / source, to)
            else:
                shutil.copytree(ROOT / source, to, ignore=_ignored, dirs_exist_ok=True)

    def _workdir(self, value: str) -> None:
        assert value == "/app"

    def _user(self, value: str) -> None:
        assert value == "hafl"

    def _entrypoint(self, value: str) -> None:
        self.entrypoint = [word.strip(' "') for word in value.strip("[]").split(",")]

    def _here(self, value: str) -> str:
        return re.sub(r"^/(app|state)\b", rf"{self.folder}/\1", value)


def _ignored(folder: str, names: list[str]) -> list[str]:
    inside = Path(folder).relative_to(ROOT)
    return [name for name in names if not sent_to_build(str(inside / name))]
