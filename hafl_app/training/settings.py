"""Settings of the base model, the adapter and local training."""

from dataclasses import dataclass
from typing import Any

from hafl_app.fields import REQUIRED, choice, number


@dataclass
class ModelSettings:
    """The frozen base model, and the classification head if `task` is `classification`.

    With `causal_lm` it learns the answers to prompts; it has no head, and `pooling` and `head` mean
    nothing. With `image_classification` it reads images instead of text, and its own classifier is
    the head (`pooling: cls`).

    `trust_remote_code` lets a hub repository's own Python code run on every node: only for a
    repository whose code you have read, and only on nodes that allow it too.

    `path` is a hub name or a local folder; `package_path` a folder inside an installed package
    that carries the same files, used when the hub is not reachable. `random_weights` without a path
    are those of a model of `shape`, the values of a Transformers configuration with its
    `model_type`; null is a tiny model for tests. Its tokenizer hashes words.

    `quantization` is what the weights of the transformer blocks are kept in: `bf16`, `int8` or
    `nf4` (4 bits), see docs/quantized.md. With `blockwise` every node chooses for every block, by
    its own data, so that the base model takes up to `memory_budget_mb` (MB of 10^6 bytes) on it;
    `memory-mb` in a node's config, a limit of everything in training, goes before that.
    """

    name: str = REQUIRED
    task: str = choice("classification", "classification", "causal_lm", "image_classification")
    path: str = ""
    revision: str | None = None
    sha256: str | None = None
    package_path: str | None = None
    num_layers: int | None = number(None, at_least=1)
    pooling: str = choice("mean", "mean", "cls")
    head: str = choice("averaged", "averaged", "frozen", "local")
    random_weights: bool = False
    shape: dict[str, Any] | None = None
    trust_remote_code: bool = False
    quantization: str = choice("none", "none", "bf16", "int8", "nf4", "blockwise")
    memory_budget_mb: float | None = number(None, above=0)


@dataclass
class LoraSettings:
    """The adapter: `max_rank` is the rank of the global one, which no client exceeds.

    `scaling` is `constant` (lora_alpha / max_rank for every client), `per_rank`
    (lora_alpha / rank) or `rslora` (lora_alpha / sqrt(rank)).
    """

    max_rank: int = number(8, at_least=1)
    lora_alpha: float = number(16.0, above=0)
    scaling: str = choice("constant", "constant", "per_rank", "rslora")
    target_modules: Any = "all-linear"
    lora_dropout: float = number(0.0, at_least=0, below=1)


@dataclass
class ClientSettings:
    """Local training. `precision` `auto` is bf16 on CUDA and fp32 on the CPU.

    `lora_B_lr_ratio` multiplies the learning rate for lora_B; `max_steps` 0 means no limit.
    `max_seconds` (0: no limit) ends training behind the step in which they are over, so that a
    slow device trains less instead of being late; a node may set `max-steps` and `max-seconds` in
    its `--node-config`, and the smaller wins. A client that stopped early keeps the weight of all
    its data. What is learned then depends on the clock: runs that must be repeatable leave both
    at 0. Privacy accounting is per round and does not see them.

    `micro_batch_size` texts go through the model at once (null: the whole batch), and their
    gradients add up to the batch's. `gradient_checkpointing` computes activations twice instead of
    keeping them.
    """

    local_epochs: int = number(1, at_least=1)
    batch_size: int = number(32, at_least=1)
    micro_batch_size: int | None = number(None, at_least=1)
    gradient_checkpointing: bool = False
    learning_rate: float = number(3e-3, above=0)
    lora_B_lr_ratio: float = number(1.0, above=0)
    optimizer: str = choice("adamw", "adamw", "sgd")
    weight_decay: float = number(0.0, at_least=0)
    max_grad_norm: float = number(1.0, at_least=0)
    max_steps: int = number(0, at_least=0)
    max_seconds: float = number(0.0, at_least=0)
    num_threads: int = number(1, at_least=1)
    device: str = choice("auto", "auto", "cpu", "cuda")
    precision: str = choice("auto", "auto", "fp32", "bf16")
