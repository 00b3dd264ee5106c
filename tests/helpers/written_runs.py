"""Folders as runs leave them, written without a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from hafl_app.tracking.details import DETAILS_FILE, importance_record, score_record

RANKS = (2, 2, 4, 8)
LABELS = ("first", "second")


def write_run(
    folder: Path,
    test: Sequence[float] = (0.1, 0.5),
    *,
    strategy: str = "flexlora",
    seed: int = 0,
    metric: str = "accuracy",
    status: str = "finished",
    clients: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    labels: Sequence[str] = LABELS,
    simulated: float | None = None,
    influence: bool = False,
    slices: Mapping[int, float] | None = None,
    **settings: Any,
) -> Path:
    """Write a run's folder: a score a round from round 0, each round 3 MB down and 1 MB up.

    Parameters
    ----------
    clients
        The clients' scores in the last round, of `RANKS`.
    simulated
        Seconds of each round on simulated devices.
    influence
        Whether each round has the clients' influence: all alike.
    slices
        Test scores of the last round's adapter by rank of device.
    settings
        Beside those of every run, by name of the group.
    """
    folder.mkdir(parents=True)
    method = {"_target_": f"hafl_app.strategies.{strategy}.Method"}
    config = {"strategy": method, "seed": seed, "output_dir": str(folder), **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records: list[dict[str, Any]] = []
    details = []
    for number, value in enumerate(test):
        scores = {f"test/{metric}": value, f"validation/{metric}": value}
        sent = {"bytes_down": 3_000_000, "bytes_up": 1_000_000} if number else {}
        of_round: dict[str, Any] = {
            "bytes_down": 0,
            "bytes_up": 0,
            "seconds": 1.0,
            "replies": 4,
            "failures": 0,
        }
        if number:
            records += [_client(number, i, rank) for i, rank in enumerate(RANKS)]
            details += [importance_record(number, "norm", {"layer.0.query": [3.0, 1.0, 0.0, 0.0]})]
        if simulated is not None:
            of_round["simulated_seconds"] = simulated if number else 0.0
        if influence and number:
            alike = dict.fromkeys(("influence", "examples", "components"), 1 / len(RANKS))
            of_round["influence"] = [
                {"partition_id": i, "rank": rank, **alike} for i, rank in enumerate(RANKS)
            ]
        records.append(
            {"kind": "round", "server_round": number, **of_round, **sent, "metrics": scores}
        )
    details += [
        score_record(len(test) - 1, i, RANKS[i], 10, {metric: score})
        for i, score in enumerate(clients)
    ]
    _lines(folder / "metrics.jsonl", records)
    _lines(folder / DETAILS_FILE, details)
    summary: dict[str, Any] = {
        "status": status,
        "metric": metric,
        "cpu_seconds": {"clients": 8.0, "server": 2.0},
    }
    ranks = [{"rank": rank, "federated": score} for rank, score in (slices or {}).items()]
    summary["device_ranks"] = ranks
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [{"train": 5, "holdout": 1, "labels": {labels[0]: 3, labels[1]: 2}} for _ in RANKS]
    (folder / "data.json").write_text(json.dumps({"label_names": labels, "clients": rows}))
    return folder


def write_adapter(folder: Path, values: Sequence[float]) -> None:
    """Write an adapter of one layer, 6 by 5, whose update has these singular values."""
    (folder / "adapter").mkdir()
    rank = len(values)
    tensors = {
        "base_model.model.layer.0.query.lora_A.weight": torch.eye(rank, 5),
        "base_model.model.layer.0.query.lora_B.weight": torch.eye(6, rank) * torch.tensor(values),
    }
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


def _client(server_round: int, number: int, rank: int) -> dict[str, Any]:
    return {
        "kind": "client",
        "server_round": server_round,
        "partition_id": number,
        "rank": rank,
        "components_trained": rank,
        "bytes_down": 500_000 * (number + 1),
        "bytes_up": 100_000,
        "error": "",
    }


def _lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
