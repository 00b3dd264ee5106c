"""Print what a quantized base model saves and costs on this CPU: memory, time, loss.

    python scripts/bench_quantized.py                  # a Llama of 98 M parameters, random weights
    python scripts/bench_quantized.py --model FOLDER   # an encoder or a causal model of one's own

Every row is a process of its own that reads the model's files, takes training steps at rank 8, and
reports its peak memory, mapped pages of the files included. `blockwise` gives the blocks half of
the bytes between all in `nf4` and all in `bf16`.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402
from hafl_app.lowrank.factors import initial_adapter  # noqa: E402
from hafl_app.plan import TrainPlan  # noqa: E402
from hafl_app.plan_parts.module_plan import ModulePlan  # noqa: E402
from hafl_app.training.batches import Batch  # noqa: E402
from hafl_app.training.causal import CausalSpec  # noqa: E402
from hafl_app.training.classifier import ClassifierSpec  # noqa: E402
from hafl_app.training.device import peak_memory_mb  # noqa: E402
from hafl_app.training.lora_model import LoraModel, LoraSpec, with_quantization  # noqa: E402
from hafl_app.training.quantization.block_precision import allocate, salience  # noqa: E402
from hafl_app.training.quantization.blocks import block_bytes  # noqa: E402
from hafl_app.training.quantization.precisions import (  # noqa: E402
    BLOCKWISE,
    NOT_QUANTIZED,
    PRECISIONS,
)
from hafl_app.training.settings import BaseSpec  # noqa: E402

ROWS = ("nothing", NOT_QUANTIZED, *reversed(PRECISIONS), BLOCKWISE)
RANK, STEPS = 8, 3
CPU = torch.device("cpu")


def spec_of(folder: str) -> LoraSpec:
    """Return the spec of a folder's model: a classifier for an encoder, else a causal model."""
    if AutoConfig.from_pretrained(folder).model_type in {"bert", "roberta", "distilbert"}:
        return ClassifierSpec(BaseSpec(folder), num_labels=7)
    return CausalSpec(BaseSpec(folder, task="causal_lm"))


def write_llama(folder: Path) -> None:
    """Write a Llama with random weights, in bfloat16 as such models are published."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)


def batch_for(model: LoraModel, texts: int, length: int) -> Batch:
    """Return random tokens, the same ones for every precision."""
    generator = torch.Generator().manual_seed(0)
    most = min(8192, model.base.config.vocab_size)
    ids = torch.randint(1, most, (texts, length), generator=generator)
    labels = ids if model.labels_shape((texts, length)) == (texts, length) else ids[:, 0] % 7
    return Batch(ids, torch.ones_like(ids), labels)


def block_precisions(spec: LoraSpec, texts: int, length: int) -> str:
    """Choose every block's precision for half of the bytes between the fewest and the most bits."""
    model = with_quantization(spec, PRECISIONS[0]).build()
    sizes = block_bytes(model.base)
    fewest, most = (sum(block[p] for block in sizes) for p in (PRECISIONS[0], PRECISIONS[-1]))
    measured = salience(model, [batch_for(model, texts, length)])
    return ",".join(allocate(measured, sizes, (fewest + most) // 2))


def measure(folder: str, row: str, texts: int, length: int) -> dict[str, float]:
    """Load and train once in this process; return MB of 10^6 bytes, seconds a step, and a loss."""
    import hafl_app.client.handlers  # noqa: F401  a node has everything imported

    if row == "nothing":
        return {"load": peak_memory_mb(CPU)}
    spec = spec_of(folder)
    chosen = block_precisions(spec, texts, length) if row == BLOCKWISE else row
    gc.collect()
    model = with_quantization(spec, chosen).build()
    weights = sum(p.numel() * p.element_size() for p in model.base.parameters())
    loaded = peak_memory_mb(CPU)
    losses, seconds = take_steps(model, batch_for(model, texts, length))
    return {
        "weights": weights / 1e6,
        "load": loaded,
        "step": peak_memory_mb(CPU),
        "seconds": float(np.median(seconds)),
        "loss": losses[0],
        "last": losses[-1],
    }


def take_steps(model: LoraModel, batch: Batch) -> tuple[list[float], list[float]]:
    """Train on one batch; return the loss before every step, and how long each took."""
    adapter = initial_adapter(model.shapes(), RANK, seed=0)
    components = tuple(range(RANK))
    plan = TrainPlan(dict.fromkeys(adapter.modules, ModulePlan(components, components)))
    model.load(adapter, plan)
    model.eval()  # no dropout: the losses are to be compared
    pairs = [p for pair in model.trainable_factors().values() for p in pair]
    optimizer = torch.optim.AdamW(pairs, lr=1e-3, fused=True)
    losses, seconds = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return losses, seconds


def print_rows(folder: str, rows: Sequence[str], texts: int, length: int) -> None:
    """Print a line for every precision, each measured in a process of its own."""
    print(f"MB of 10^6 bytes; rank {RANK}, {texts} texts of {length} tokens, float32\n")
    print("| base model | weights | peak, loading | peak, training | s a step | loss | after 2 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for row in rows:
        command = [sys.executable, __file__, "--model", folder, "--row", row]
        command += ["--texts", str(texts), "--length", str(length)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{row} on {folder} failed")
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [found.get(k) for k in ("weights", "load", "step")]
        numbers = [f"{mb:.0f}" if mb else "-" for mb in cells]
        if "loss" in found:
            numbers += [f"{found['seconds']:.2f}", f"{found['loss']:.4f}", f"{found['last']:.4f}"]
        print(f"| {row} | {' | '.join(numbers)} |", flush=True)


def _print(arguments: argparse.Namespace) -> int:
    texts, length = arguments.texts, arguments.length
    if arguments.row:
        print(json.dumps(measure(arguments.model, arguments.row, texts, length)))
    elif arguments.model:
        print_rows(arguments.model, ROWS, texts, length)
    else:
        with TemporaryDirectory() as folder:
            write_llama(Path(folder))
            print_rows(folder, ROWS, texts, length)
    return 0


def main() -> int:
    """Run the benchmarks that the command line asks for, and print their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER", help="a model in Hugging Face format")
    parser.add_argument("--texts", type=int, default=4, help="texts a step (4)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text (64)")
    parser.add_argument("--row", choices=ROWS, help="measure one row, print it as JSON")
    return run_script(lambda: _print(parser.parse_args()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
