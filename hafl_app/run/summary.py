"""Parts of a run's ``summary.json``: model, bytes by phase and rank, devices, versions."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from hafl_app.server.traffic import Ledger
from hafl_app.training.settings import ModelSettings
from hafl_app.wire.node_profile import NodeProfile

_PHASES = ("train", "evaluate", "head", "alone", "unseen")
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


def model_facts(model: ModelSettings) -> dict[str, Any]:
    """Return the base model's name, whether its weights are random, and whether it drops out."""
    return {
        "name": model.title,
        "random_weights": model.random_weights,
        "dropout": model.dropout,
    }


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
