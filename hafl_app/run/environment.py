"""What a run finds on this machine: packages, devices, disk, memory, hub, what others left behind.

Every check returns a finding. `hafl doctor` prints them all; the preflight of a run asks those that
decide whether it can work (`DECIDING`), and refuses it by the first that is broken. Without torch.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import psutil
from packaging.requirements import Requirement

from hafl_app.cgroups import usable_cpus, usable_memory
from hafl_app.config.overrides import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.kept import cache_folder
from hafl_app.packages import APP, OPTIONAL, install_command, is_installed, short
from hafl_app.process_identity import is_alive
from hafl_app.training.locate import ModelError, locate, present, unread_gguf, weights_note
from hafl_app.training.settings import BaseSpec

FINE, NOTE, BROKEN = "ok", "note", "broken"
_PYTHONS: Final = ((3, 11), (3, 12))
_LEAST_DISK_MB, _LITTLE_DISK_MB = 50, 2_000
_LITTLE_MEMORY_MB = 2_000
_LEAST_SHARED_MB = 60  # Docker's default, with which Ray writes its objects to the disk
FLOWER_PORTS: Final = (9091, 9092, 9093)
"""Of a SuperLink that is started with its defaults."""

_OWNER = "HAFL_RUN_OWNER"
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Parameters
    ----------
    name
        Of the check.
    level
        `FINE`; `NOTE`: worth knowing; `BROKEN`: a run cannot work.
    text
        In one line.
    remedy
        A command or a setting that changes it; empty if nothing needs to be changed.
    """

    name: str
    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return both on one line."""
        return f"{self.text}: {self.remedy}" if self.remedy else self.text


Check = Callable[[Settings | None], Finding]


def python(_settings: Settings | None) -> Finding:
    """Look at the interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if tuple(sys.version_info[:2]) in _PYTHONS:
        return Finding("Python", FINE, f"{version}, {sys.executable}")
    return Finding(
        "Python", BROKEN, f"{version}, expected 3.11 or 3.12",
        "HAFL_VENV=.venv PYTHON=python3.12 bash scripts/setup.sh",
    )  # fmt: skip


def packages(_settings: Settings | None) -> Finding:
    """Look for the packages that the app needs, and at their versions."""
    missing, other = [], []
    wanted = list(_required())
    for requirement in wanted:
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            other.append(f"{requirement.name} {found} ({requirement.specifier})")
    if missing:
        command = install_command(missing[0])
        return Finding("Packages", BROKEN, f"{', '.join(missing)} not installed", command)
    if other:
        return Finding("Packages", NOTE, f"versions not tested: {', '.join(other)}", _setup())
    return Finding("Packages", FINE, f"all {len(wanted)} of {APP} are there")


def _required() -> Iterator[Requirement]:
    """Yield what the installed app asks for; nothing where it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.requires(APP) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield requirement


def _setup() -> str:
    script = Path(__file__).resolve().parents[2] / "scripts" / "setup.sh"
    return f"bash {short(script)}" if script.is_file() else "pip install the wheel again"


def torch(settings: Settings | None) -> Finding:
    """Look at torch's build and at the GPUs, without importing it."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return Finding("torch", BROKEN, "not installed", install_command("torch"))
    version = metadata.version("torch")
    cuda = _cuda_of_torch(Path(found.origin).with_name("version.py"))
    gpus = _gpus()
    wants_gpu = settings is not None and settings.client.device == "cuda"
    line = f"{version}, {f'for CUDA {cuda}' if cuda else 'for the CPU'}"
    if gpus and not cuda:
        line += f"; this machine has {gpus}, which it cannot use"
        level = BROKEN if wants_gpu else NOTE
        return Finding("torch", level, line, "install torch from a CUDA index of pytorch.org")
    if wants_gpu and not gpus:
        return Finding(
            "torch", BROKEN, f"{line}; client.device=cuda finds no CUDA device", "client.device=cpu"
        )
    return Finding("torch", FINE, f"{line}, {gpus or f'{usable_cpus()} CPUs, no GPU'}")


def _cuda_of_torch(file: Path) -> str:
    """Return the CUDA version that torch was built for; empty for the CPU."""
    with suppress(OSError):
        match = re.search(r"^cuda\b[^=]*= '([^']+)'", file.read_text(), re.MULTILINE)
        return match[1] if match else ""
    return ""


def _gpus() -> str:
    """Return the names of NVIDIA's GPUs with their memory, as its driver says; empty without."""
    if shutil.which("nvidia-smi") is None:
        return ""
    fields = "--query-gpu=name,memory.total"
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["nvidia-smi", fields, "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
        return "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip())
    return ""


def flower(settings: Settings | None) -> Finding:
    """Look for Flower and, for simulations by `flwr run`, its commands."""
    try:
        version = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        return Finding("Flower", BROKEN, "flwr is not installed", install_command("flwr"))
    lacks = [name for name in ("flwr", "flower-superlink") if not _has_command(name)]
    if lacks:
        level = BROKEN if _on_ray(settings) else NOTE
        return Finding("Flower", level, f"{version}, no command {' or '.join(lacks)}", _setup())
    return Finding("Flower", FINE, version)


def _has_command(name: str) -> bool:
    return Path(sys.executable).with_name(name).exists() or shutil.which(name) is not None


def _on_ray(settings: Settings | None) -> bool:
    return settings is not None and settings.engine == "ray"


def ray(settings: Settings | None) -> Finding:
    """Look for Ray, on which simulations run unless `engine=inprocess`."""
    if not is_installed("ray"):
        level = BROKEN if _on_ray(settings) else NOTE
        remedy = f"engine=inprocess, or {install_command('ray')}"
        return Finding("Ray", level, "not installed", remedy)
    version, shared = metadata.version("ray"), Path("/dev/shm")
    if shared.is_dir() and (room := shutil.disk_usage(shared).total / 1e6) < _LEAST_SHARED_MB:
        line = f"{version}; /dev/shm has {room:.0f} MB, so that its objects go to the disk"
        return Finding("Ray", NOTE, line, "docker run --shm-size=2g ..., or engine=inprocess")
    return Finding("Ray", FINE, version)


def superlinks(_settings: Settings | None) -> Finding:
    """Look for SuperLinks that a killed run has left, and for others that are at work."""
    stale: list[int] = []
    others: list[int] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if any(Path(word).name == "flower-superlink" for word in process.cmdline()[:2]):
                owner = process.environ().get(_OWNER, "")
                (stale if owner and not is_alive(owner) else others).append(process.pid)
    if stale:
        pids = " ".join(map(str, stale))
        line = f"left behind by a run that was killed: process {pids}"
        return Finding("SuperLink", NOTE, line, f"kill {pids}")
    running = f"at work: process {', '.join(map(str, others))}" if others else "none at work"
    return Finding("SuperLink", FINE, running)


def ports(settings: Settings | None) -> Finding:
    """Try the loopback, and the ports that a SuperLink takes by default."""
    try:
        _bind(0)
    except OSError as error:
        level = BROKEN if _on_ray(settings) else NOTE
        line = f"no port of the loopback can be opened ({error})"
        return Finding("Ports", level, line, "engine=inprocess needs none")
    taken = [str(port) for port in FLOWER_PORTS if not _is_free(port)]
    if taken:
        line = f"{', '.join(taken)} are taken; a run of `hafl simulate` uses others"
        return Finding("Ports", NOTE, line, "flower-superlink --help names the options")
    return Finding("Ports", FINE, f"{', '.join(map(str, FLOWER_PORTS))} are free")


def _is_free(port: int) -> bool:
    try:
        _bind(port)
    except OSError:
        return False
    return True


def _bind(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def base_model(settings: Settings | None) -> Finding:
    """Look for the base model's files: on this machine, else on the hub."""
    spec = _default_model() if settings is None else settings.model
    try:
        if line := _on_this_machine(spec):
            return Finding("Base model", FINE, line)
    except ModelError as error:
        return Finding("Base model", BROKEN, str(error))
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        level = BROKEN if settings is not None else NOTE
        line = f"{spec.path} is not on this machine, and HF_HUB_OFFLINE is set"
        return Finding("Base model", level, line, "model.path=FOLDER, or go online")
    if settings is None:
        return Finding("Base model", NOTE, f"{spec.path} is to be fetched from the hub", _setup())
    try:
        return Finding("Base model", FINE, f"{spec.path}, in {locate(spec)}")
    except ModelError as error:
        return Finding("Base model", BROKEN, str(error))


def _on_this_machine(spec: BaseSpec) -> str | None:
    """Say where a base model's files are; None if they are not on this machine."""
    if spec.is_without_files:
        return "random weights, no files needed"
    if found := present(spec):
        return ", ".join(filter(None, (spec.path, f"in {short(found)}", weights_note(spec))))
    if file := unread_gguf(spec):
        return f"{spec.path}, to be read once from {file.name} if the hub cannot be reached"
    return None


def _default_model() -> BaseSpec:
    from omegaconf import OmegaConf  # noqa: PLC0415

    from hafl_app.config.compose import merge_files  # noqa: PLC0415  with Hydra: only when asked

    # Without a method, whose class would import torch.
    spec: BaseSpec = OmegaConf.to_object(merge_files([]).model)  # type: ignore[assignment]
    return spec


def hub(_settings: Settings | None) -> Finding:
    """See whether Hugging Face's hub can be reached; no run needs it whose files are here."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return Finding("Hub", FINE, "offline by HF_HUB_OFFLINE: files of its cache alone are used")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    host = address.partition("://")[2].partition("/")[0].partition(":")[0]
    try:
        socket.create_connection((host, 443), timeout=2).close()
    except OSError:
        line = f"{host} cannot be reached directly; models and data that are here need it not"
        return Finding("Hub", NOTE, line, "HF_HUB_OFFLINE=1 saves its time-outs")
    return Finding("Hub", FINE, f"{host} can be reached")


def disk(settings: Settings | None) -> Finding:
    """Look at the room where a run writes, and where its processes put their files."""
    output = Path(settings.output_dir).expanduser() if settings and settings.output_dir else None
    temporary = Path(tempfile.gettempdir())
    places = {"output": _existing(output or Path("outputs")), "temporary": temporary}
    room = {name: shutil.disk_usage(path).free / 1e6 for name, path in places.items()}
    line = ", ".join(
        f"{room[name] / 1000:.1f} GB free for {name} files in {path}"
        for name, path in places.items()
    )
    least = min(room.values())
    unwritable = [str(path) for path in places.values() if not os.access(path, os.W_OK)]
    if unwritable:
        return Finding("Disk", BROKEN, f"{unwritable[0]} cannot be written", "output_dir=FOLDER")
    if least < _LEAST_DISK_MB:
        return Finding("Disk", BROKEN, line, "output_dir=FOLDER and TMPDIR=FOLDER name others")
    if least < _LITTLE_DISK_MB:
        return Finding("Disk", NOTE, line, "output_dir=FOLDER and TMPDIR=FOLDER name others")
    return Finding("Disk", FINE, line)


def _existing(path: Path) -> Path:
    """Return the nearest folder above a path that is there, or itself."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.is_dir())


def memory(_settings: Settings | None) -> Finding:
    """Look at the memory that this process may use, limits of a container included."""
    total, free = usable_memory()
    line = f"{free / _GB:.1f} of {total / _GB:.1f} GB free"
    if free / 1e6 < _LITTLE_MEMORY_MB:
        return Finding("Memory", NOTE, line, "engine=inprocess has all clients in one process")
    return Finding("Memory", FINE, line)


def caches(_settings: Settings | None) -> Finding:
    """Look at the folders where tokenized data, measurements and the hub's files are kept."""
    own = cache_folder()
    place = _existing(own)
    if not os.access(place, os.W_OK):
        line = f"{place} cannot be written, so that texts are tokenized in every run"
        return Finding("Caches", BROKEN, line, "HAFL_CACHE=FOLDER names another")
    return Finding("Caches", FINE, f"{short(own)} ({_size(own) / 1e6:.0f} MB)")


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += (Path(place) / name).stat().st_size
    return total


def optional(_settings: Settings | None) -> Finding:
    """Look for the packages that only some settings need."""
    there = [name for name in OPTIONAL if is_installed(name)]
    absent = {name: what for name, what in OPTIONAL.items() if name not in there}
    line = f"{', '.join(there)} installed" if there else "none installed"
    if not absent:
        return Finding("Optional", FINE, line)
    lacks = ", ".join(f"{name} ({what})" for name, what in absent.items())
    return Finding("Optional", FINE, f"{line}; not: {lacks}", install_command(next(iter(absent))))


DECIDING: Final[tuple[Check, ...]] = (python, packages, torch, flower, ray, disk, caches)
"""Checks by which a run is refused before anything is written."""

CHECKS: Final[tuple[Check, ...]] = (
    python, packages, torch, ray, flower, superlinks, ports, base_model, hub, disk, memory, caches,
    optional,
)  # fmt: skip
"""All checks, in the order in which they are shown."""


def require_environment(settings: Settings) -> None:
    """Refuse a run that cannot work on this machine.

    Raises
    ------
    SettingsError
        In one line: what is broken, and what changes it.
    """
    for check in DECIDING:
        finding = check(settings)
        if finding.level == BROKEN:
            raise SettingsError(f"{finding.name}: {finding}")


def findings(settings: Settings | None) -> Iterator[Finding]:
    """Yield what every check finds."""
    for check in CHECKS:
        yield check(settings)
