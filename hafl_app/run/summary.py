"""Parts of a run's ``summary.json``: model, data set, machine, bytes, devices, versions."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from hafl_app.cgroups import usable_cpus
from hafl_app.config.schema import Settings
from hafl_app.data.settings import DatasetSettings
from hafl_app.run.origin import Origin
from hafl_app.run.plain_settings import plain_settings
from hafl_app.run.precisions import server_precision
from hafl_app.server.traffic import Ledger
from hafl_app.training.locate import weights_note
from hafl_app.training.settings import ModelSettings
from hafl_app.wire.node_profile import NodeProfile

_PHASES = ("train", "evaluate", "head", "alone", "unseen", "generate")
_DEVICE_FACTS = (
    "partition_id",
    "rank",
    "device",
    "device_name",
    "memory_total_mb",
    "memory_free_mb",
    "torch_version",
    "cuda_version",
    "precision",
)
_PACKAGES = ("flwr", "torch", "transformers", "peft", "ray", "datasets")


def run_facts(settings: Settings, origin: Origin, examples: int, classes: int) -> dict[str, Any]:
    """Return what the run was: name, command, machine, method, data and model.

    Parameters
    ----------
    examples, classes
        See `dataset_facts`.
    """
    return {
        "name": settings.name,
        "tags": list(settings.tags),
        "command": origin.command,
        "commit": origin.commit,
        "machine": machine_facts(),
        "strategy": plain_settings(settings)["strategy"],
        "dataset": dataset_facts(settings.dataset, examples, classes),
        "model": model_facts(settings.model),
        "precision": server_precision(settings),
        "seed": settings.seed,
    }


def model_facts(model: ModelSettings) -> dict[str, Any]:
    """Return the base model's names, whether its weights are random, and whether it drops out.

    And what its weights were read from, if that is not the files of that name.
    """
    note = weights_note(model)
    return {
        "name": model.title,
        "path": model.path,
        "revision": model.revision,
        "random_weights": model.random_weights,
        "dropout": model.dropout,
        **({"weights": note} if note else {}),
    }


def dataset_facts(dataset: DatasetSettings, examples: int, classes: int) -> dict[str, Any]:
    """Return the name of the data, and how much of it there is.

    Parameters
    ----------
    examples
        Training examples of all clients, as they state them.
    classes
        0 for a task without classes.
    """
    return {
        "source": dataset.source,
        "path": dataset.path or dataset.hub,
        "revision": dataset.revision,
        "examples": examples,
        "classes": classes,
    }


def machine_facts() -> dict[str, Any]:
    """Return the machine of the server: its name, system, processor, CPUs and memory."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": usable_cpus(),
        "memory_total_mb": round(psutil.virtual_memory().total / 1e6),
        "gpus": torch.cuda.device_count(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()


def bytes_by_phase(ledger: Ledger) -> dict[str, Any]:
    """Return the bytes of every phase, also by rank, with the number of rejected replies."""
    return {phase: _bytes_of(ledger, phase) for phase in _PHASES}


def _bytes_of(ledger: Ledger, phase: str) -> dict[str, Any]:
    total = ledger.of_phase(phase)
    return {
        "down": total.bytes_down,
        "up": total.bytes_up,
        "refused": total.refused,
        "by_rank": {str(rank): asdict(part) for rank, part in ledger.by_rank(phase).items()},
    }


def device_facts(profile: NodeProfile) -> dict[str, Any]:
    """Return the device of a node, by name of the profile's fields."""
    return {name: getattr(profile, name) for name in _DEVICE_FACTS}


def versions() -> Mapping[str, str]:
    """Return the versions of the app, of Python, and of the packages that decide results."""
    return {
        "hafl-app": "0.1.0",
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }
