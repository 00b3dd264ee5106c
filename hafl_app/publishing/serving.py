"""Adapters of several ranks in one folder, which vLLM serves side by side."""

import json
import shlex
from collections.abc import Sequence
from typing import Final

from huggingface_hub import ModelCard, ModelCardData

from hafl_app.metrics import CAUSAL_LM
from hafl_app.printable import markdown_text
from hafl_app.publishing.exported import Exported
from hafl_app.publishing.usage import base_name, base_title
from hafl_app.training.adapter_files import StoredAdapter

MAX_LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts for ``--max-lora-rank`` (``MaxLoRARanks`` in its ``vllm/config/lora.py``)."""


def require_served(stored: StoredAdapter, largest: int) -> None:
    """Refuse adapters that vLLM cannot serve.

    Parameters
    ----------
    largest
        Of their ranks.

    Raises
    ------
    ValueError
        In one line.
    """
    base = stored.spec.base
    if base.task != CAUSAL_LM.name:
        raise ValueError(f"--vllm: the adapter's task is {base.task}; expected {CAUSAL_LM.name}")
    if base.random_weights:
        raise ValueError("--vllm: the base model has random weights, so there is none to serve")
    if base.num_layers is not None:
        raise ValueError(
            f"--vllm: the base model is cut to {base.num_layers} layers, and vLLM serves all; "
            "use --merge"
        )
    if largest > MAX_LORA_RANKS[-1]:
        raise ValueError(
            f"--vllm: rank {largest}: expected at most {MAX_LORA_RANKS[-1]}, vLLM's largest "
            "--max-lora-rank"
        )


def max_lora_rank(largest: int) -> int:
    """Return the smallest ``--max-lora-rank`` that has room for adapters of a rank."""
    return next(rank for rank in MAX_LORA_RANKS if rank >= largest)


def serve_command(exports: Sequence[Exported]) -> str:
    """Return the command that serves these adapters, typed in the folder that theirs are in."""
    base = exports[0].stored.spec.base
    words = ["vllm", "serve", base_name(base)]
    words += ["--revision", base.revision] if base.revision else []
    words += ["--trust-remote-code"] if base.trust_remote_code else []
    words += ["--enable-lora", "--max-lora-rank", str(max_lora_rank(max(e.rank for e in exports)))]
    words += ["--max-loras", str(len(exports)), "--lora-modules"]
    return shlex.join([*words, *(f"{export.name}={export.name}" for export in exports)])


def serving_card(
    exports: Sequence[Exported], base_model: str | None, license_id: str | None
) -> str:
    """Return the card of a folder of adapters.

    Parameters
    ----------
    base_model
        Name of the base model on the hub; None if it has none.
    license_id
        That of the base model; None if not known.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        license=license_id,
        pipeline_tag="text-generation",
        tags=["lora", "vllm", "federated-learning", "flower"],
    )
    title = markdown_text(base_title(exports[0].stored.spec.base))
    rows = [_row(export) for export in exports]
    text = [
        f"# Adapters of {title}, one for each rank",
        "vLLM holds the base model once and answers with each of them. In this folder:",
        f"```bash\n{serve_command(exports)}\n```",
        "A request names its adapter as the model; one that names the base model goes without:",
        f"```bash\n{_request(exports[0])}\n```",
        "\n".join(["| folder | rank | lost of the squared norm |", "| --- | --- | --- |", *rows]),
        "How they were trained, and what they score, is in the cards of the folders.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n"))


def _row(export: Exported) -> str:
    lost = "0.00%" if export.truncation is None else f"{export.truncation.lost:.2%}"
    return f"| [{export.name}]({export.name}) | {export.rank} | {lost} |"


def _request(export: Exported) -> str:
    template = export.run.setting("dataset", "template")
    asked = {
        "model": export.name,
        "prompt": template if isinstance(template, str) else "Once upon a time",
        "max_tokens": 64,
        "temperature": 0,
    }
    words = ["curl", "http://localhost:8000/v1/completions", "-H", "Content-Type: application/json"]
    return shlex.join([*words, "-d", json.dumps(asked)])
