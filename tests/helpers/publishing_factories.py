"""Base models as from the hub, adapters of them, and facts of their runs."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.training.adapter_files import save_adapter
from hafl_app.training.causal import CausalSpec
from hafl_app.training.classifier import ClassifierSpec
from hafl_app.training.lora_model import LoraModel, LoraSpec
from hafl_app.training.settings import BaseSpec

LABELS = ("sport", "world", "science")
RANK = 6
SETTINGS = {"_target_": "hafl_app.strategies.hafl.Hafl", "max_rank": RANK, "scheme": "freezing"}
IDS = torch.tensor([[5, 9, 2, 7], [3, 8, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
ROWS = ([5, 9, 2, 7], [3, 8, 12])
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text", "another", "one", "longer"]


def bert_base(folder: Path) -> Path:
    """Write a BERT of three layers with pooler and tokenizer; its card states a license."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=3,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def llama_base(folder: Path) -> Path:
    """Write a Llama of two layers, no linear layer of which is square."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def _with_tokenizer(folder: Path) -> Path:
    words = folder / "vocab.txt"
    words.write_text("\n".join(_WORDS) + "\n")
    BertTokenizerFast(vocab=str(words)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A base model\n")
    return folder


def spec_of(kind: str, base: Path, **base_settings: Any) -> LoraSpec:
    if kind == "causal":
        return CausalSpec(BaseSpec(str(base), task="causal_lm", **base_settings), seed=5)
    return ClassifierSpec(BaseSpec(str(base), pooling=kind, **base_settings), len(LABELS), seed=5)


def adapter_for(model: LoraModel, ranks: int | Callable[[str], int] = RANK) -> Adapter:
    """Return factors whose components fade, lora_B not 0, and a head that is not the initial."""
    generator = torch.Generator().manual_seed(3)
    modules = {}
    for name, shape in model.shapes().items():
        rank = ranks if isinstance(ranks, int) else ranks(name)
        fading = 0.6 ** torch.arange(rank)
        modules[name] = LoraFactors(
            0.2 * torch.randn(rank, shape.in_features, generator=generator),
            0.3 * torch.randn(shape.out_features, rank, generator=generator) * fading,
        )
    head = {
        name: tensor + torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.initial_head.items()
    }
    return Adapter(modules, head)


def save_run(run: Path, spec: LoraSpec, adapter: Adapter, *, seed: int = 0) -> Path:
    """Write a run's folder: adapter, summary and settings; return it."""
    causal = not spec.num_labels
    score = (20.0 if causal else 0.8) + 0.02 * seed
    metrics = {"test/perplexity" if causal else "test/accuracy": score}
    facts = {"server_round": 4, "metrics": metrics, "strategy": SETTINGS, "seed": seed}
    save_adapter(
        run / "adapter",
        adapter,
        spec,
        label_names=LABELS if not causal else (),
        max_length=16,
        facts=facts,
    )
    (run / "summary.json").write_text(json.dumps(_summary(metrics, seed)))
    (run / "config.yaml").write_text(
        "dataset: {source: banking77, hub: mteb/banking77, path: /home/me/data,\n"
        '  template: "{text} another"}\n'
        "partition: {kind: dirichlet, dirichlet_alpha: 0.5}\n"
        "privacy: {kind: none}\n"
    )
    return run


@torch.no_grad()
def log_likelihoods(model: Any, rows: Sequence[Sequence[int]] = ROWS) -> torch.Tensor:
    """Return the log-likelihood of each row of tokens, its first one given."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(logits.gather(-1, ids[0, 1:, None]).sum())
    return torch.stack(found)


_BY_PLAIN_PEFT = """
import json, sys

sys.modules["hafl_app"] = None  # as if it were not installed: importing it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, folder, rows = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
if folder:
    model = PeftModel.from_pretrained(model, folder).eval()
for row in rows:
    ids = torch.tensor([row])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    print(float(logits.gather(-1, ids[0, 1:, None]).sum()))
"""


def likelihoods_by_plain_peft(
    base: Path, folder: Path | None, rows: Sequence[Sequence[int]] = ROWS
) -> torch.Tensor:
    """Return log-likelihoods by an adapter, or by its base, in a process without this project."""
    given = json.dumps([str(base), folder and str(folder), rows])
    command = [sys.executable, "-I", "-c", _BY_PLAIN_PEFT, given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.tensor([float(line) for line in done.stdout.splitlines()])


def _summary(metrics: dict[str, float], seed: int) -> dict[str, Any]:
    exchanged = {"bytes_down": 3_000_000, "bytes_up": 1_500_000, "exchanges": 3}
    return {
        "status": "finished",
        "strategy": SETTINGS,
        "seed": seed,
        "rounds": 4,
        "final": metrics,
        "metric": "accuracy",
        "nodes": [{"rank": 2}, {"rank": RANK}, {"rank": 2}],
        "device_ranks": [{"rank": 2, "federated": 0.71}],
        "bytes": {"train": {"down": 3_000_000, "up": 1_500_000, "by_rank": {"2": exchanged}}},
    }
