"""Print the memory that a rank needs on common base models, and how far off the count is.

    python scripts/memory_table.py                          # the table: counted, nothing is loaded
    python scripts/memory_table.py --presets                # of the language models in conf/model
    python scripts/memory_table.py --measure FOLDER         # one model's, beside real trainings

Counted are all tensors of a training step in float32 (`hafl_app.training.step_memory`), from the
shapes of a model's published configuration, so no weights are needed. `--measure` trains a model
from a local folder on the CPU, a process for each rank, beside its peak memory.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BertConfig, LlamaConfig, PretrainedConfig, RobertaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.preset_shapes import CAUSAL, ENCODERS  # noqa: E402

from hafl_app.cli import run_script  # noqa: E402
from hafl_app.lowrank.factors import initial_adapter  # noqa: E402
from hafl_app.plan import TrainPlan  # noqa: E402
from hafl_app.plan_parts.module_plan import ModulePlan  # noqa: E402
from hafl_app.training.base_model import base_without_weights  # noqa: E402
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier  # noqa: E402
from hafl_app.training.device import peak_memory_mb  # noqa: E402
from hafl_app.training.local import train  # noqa: E402
from hafl_app.training.lora_model import adapter_shapes  # noqa: E402
from hafl_app.training.settings import BaseSpec, TrainOptions  # noqa: E402
from hafl_app.training.specs import lora_spec  # noqa: E402
from hafl_app.training.step_memory import StepMemory, count_step, step_memory  # noqa: E402

RANKS = (1, 2, 4, 8, 16, 32, 64)
MEASURED_RANKS = (1, 8, 64)
PRESET_RANKS, STEP_RANK = (2, 8, 16, 64), 8
TRAINED_BYTES = 16  # of a number that is trained: itself, its gradient and two moments in float32
CPU = torch.device("cpu")
NUM_LABELS = 77  # BANKING77


def configurations() -> dict[str, PretrainedConfig]:
    """Return the models of the table by name; the last two are no encoders."""
    minilm: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536}
    large: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096}
    tiny_llama: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632}
    return {
        "MiniLM-L6": BertConfig(**minilm, num_hidden_layers=6),
        "BERT-base": BertConfig(),
        "RoBERTa-large": RobertaConfig(
            **large,
            num_hidden_layers=24,
            num_attention_heads=16,
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
        ),
        "TinyLlama-1.1B": LlamaConfig(**tiny_llama, num_hidden_layers=22, num_key_value_heads=4),
        "Llama-7B": LlamaConfig(),
    }


def counted(folder: str, options: TrainOptions, length: int) -> StepMemory:
    """Count a model's training step, for adapters on all linear layers."""
    return step_memory(_spec(folder), max(RANKS), options, length, CPU)


def _spec(folder: str) -> ClassifierSpec:
    return ClassifierSpec(BaseSpec(folder), NUM_LABELS)


def print_table(options: TrainOptions, length: int) -> None:
    """Print a line of tensors and a line of whole CPU processes for each model, in MB."""
    print(f"MB of 10^6 bytes; AdamW, {options.batch_size} texts of {length} tokens, float32\n")
    ranks = " | ".join(f"{rank:>6}" for rank in RANKS)
    print(f"| {'model':<15} | weights | of            | {ranks} |")
    print(f"|{'---|' * (3 + len(RANKS))}")
    for name, config in configurations().items():
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            step = counted(folder, options, length)
        for what, size in (("tensors", step.tensors_mb), ("a CPU process", step.needed_mb)):
            cells = " | ".join(f"{size(rank):>6.0f}" for rank in RANKS)
            print(f"| {name:<15} | {step.weights / 1e6:>7.0f} | {what:<13} | {cells} |", flush=True)


def print_presets(options: TrainOptions, length: int) -> None:
    """Print a line for each model that `conf/model` names: weights, adapter by rank, a step.

    The adapter's bytes are those of factors, gradients and two moments in float32; the step is
    counted with a text at a time and weights in bf16.
    """
    options = replace(options, micro_batch_size=1, precision="bf16")
    ranks = " | ".join(f"rank {rank}, MB" for rank in PRESET_RANKS)
    print(
        "| preset | parameters, M | in bf16, GB",
        ranks,
        f"step at rank {STEP_RANK}, GB |",
        sep=" | ",
    )
    print(f"|{'---|' * (4 + len(PRESET_RANKS))}")
    for name, shape in (CAUSAL | ENCODERS).items():
        is_causal = name in CAUSAL
        task = "causal_lm" if is_causal else "classification"
        spec = lora_spec(BaseSpec(random_weights=True, shape=shape, task=task), 0)
        weights = sum(p.numel() for p in base_without_weights(spec.base, 0).parameters())
        a_rank = sum(s.out_features + s.in_features for s in adapter_shapes(spec).values())
        cells = " | ".join(f"{TRAINED_BYTES * a_rank * rank / 1e6:,.0f}" for rank in PRESET_RANKS)
        print(f"| `{name}` | {weights / 1e6:,.1f} | {2 * weights / 1e9:.2f} | {cells} | ", end="")
        sized = spec if is_causal else lora_spec(spec.base, NUM_LABELS)
        step = count_step(sized, STEP_RANK, STEP_RANK, options, length, CPU)
        print(f"{step.peak / 1e9:.2f} |", flush=True)


def print_measured(folder: str, options: TrainOptions, length: int) -> None:
    """Print the peak memory of real trainings beside what was counted for them."""
    step = counted(folder, options, length)
    print(f"{'rank':>4}  {'process, MB':>11}  {'estimate, MB':>12}  estimate over process")
    for rank in MEASURED_RANKS:
        command = [sys.executable, __file__, "--measure", folder, "--rank", str(rank)]
        command += ["--batch-size", str(options.batch_size), "--length", str(length)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        needed = step.needed_mb(rank)
        print(f"{rank:>4}  {peak:>11.0f}  {needed:>12.0f}  {needed / peak - 1:+.0%}", flush=True)


@dataclass(frozen=True)
class _Texts:
    """Random texts, as `hafl_app.training.batches.Examples` describes them."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]


def _texts(number: int, length: int) -> _Texts:
    rng = np.random.default_rng(0)
    lengths = length - np.arange(number) % 3  # so that there is something to mask
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, 500, offsets[-1]).astype(np.int32)
    return _Texts(tokens, offsets, rng.integers(0, NUM_LABELS, number))


def train_once(folder: str, rank: int, options: TrainOptions, length: int) -> float:
    """Take three steps at a rank of a global adapter of the largest; return the peak in MB."""
    import hafl_app.client.handlers  # noqa: F401  a node has everything imported

    classifier = LoraClassifier(_spec(folder))
    held = max(RANKS)
    adapter = initial_adapter(classifier.shapes(), held, seed=0)
    module = ModulePlan(tuple(range(held)), tuple(range(rank)))
    plan = TrainPlan(dict.fromkeys(adapter.modules, module), importance="smoothed")
    train(classifier, adapter, plan, _texts(3 * options.batch_size, length), options, seed=0)
    return peak_memory_mb(CPU)


def main() -> int:
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=_positive, default=32, help="texts per step (32)")
    parser.add_argument("--length", type=_positive, default=64, help="tokens of a text (64)")
    parser.add_argument("--presets", action="store_true", help="of the models in conf/model")
    parser.add_argument("--measure", metavar="FOLDER", help="train the model of this folder")
    parser.add_argument(
        "--rank", type=_positive, help="train once at this rank, print the peak in MB"
    )
    arguments = parser.parse_args()
    return run_script(lambda: _print(arguments))


def _print(arguments: argparse.Namespace) -> int:
    options = replace(TrainOptions(), batch_size=arguments.batch_size)
    folder = arguments.measure and str(Path(arguments.measure).resolve())
    if folder and arguments.rank:
        print(train_once(folder, arguments.rank, options, arguments.length))
    elif arguments.presets:
        print_presets(options, arguments.length)
    elif folder:
        print_measured(folder, options, arguments.length)
    else:
        print_table(options, arguments.length)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
