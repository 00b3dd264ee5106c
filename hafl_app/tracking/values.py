"""What external trackers log: a run's records as numbers by name, and its settings as config."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from hafl_app.printable import printable
from hafl_app.tracking.base import ClientRecord, ClientRow, RoundRecord

_SECRET: Final = {"privacy": ("noise_seed",)}
"""Settings by group that stay on this machine: by this one the noise can be computed."""

_LONGEST_DEVICE: Final = 100


def round_values(record: RoundRecord) -> dict[str, float]:
    """Return a round's finite numbers by name: scores, loss, seconds, bytes, replies."""
    return _finite(
        {
            **record.metrics,
            "train/loss": record.train_loss,
            "round/seconds": record.seconds,
            "round/replies": record.replies,
            "round/failures": record.failures,
            "round/bytes-down": record.bytes_down,
            "round/bytes-up": record.bytes_up,
            "round/simulated-seconds": record.simulated_seconds,
        }
    )


def client_values(record: ClientRecord) -> dict[str, float]:
    """Return the finite numbers of a client's training, under ``client/<partition>/``."""
    values = {
        "loss": record.loss,
        "seconds": record.seconds,
        "components-trained": record.components_trained,
        "peak-memory-mb": record.peak_memory_mb,
        "bytes-down": record.bytes_down,
        "bytes-up": record.bytes_up,
        "failed": int(bool(record.error)),
        "flops": record.flops,
        "simulated-seconds": record.simulated_seconds,
    }
    return _finite({f"client/{record.partition_id}/{name}": v for name, v in values.items()})


def summary_values(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of the last round and of the best, under ``final/`` and ``best/``."""
    parts = {"final": "final", "best_validation": "best", "best_clients": "best"}
    return _finite(
        {
            f"{prefix}/{name}": value
            for part, prefix in parts.items()
            for name, value in summary.get(part, {}).items()
            if isinstance(value, int | float)
        }
    )


def run_config(settings: Mapping[str, Any], clients: Sequence[ClientRow]) -> dict[str, Any]:
    """Return a run's settings and its clients, without what must stay secret."""
    rows = [
        {
            "partition_id": row.partition_id,
            "rank": row.rank,
            "examples": row.examples,
            "device": printable(row.device, _LONGEST_DEVICE),
        }
        for row in clients
    ]
    shown = {
        group: {k: v for k, v in values.items() if k not in _SECRET[group]}
        if group in _SECRET and isinstance(values, Mapping)
        else values
        for group, values in settings.items()
    }
    return {**shown, "clients": rows}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their full names, ``lora.max_rank``."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
