"""Settings of the base model, the adapter and local training."""

from dataclasses import dataclass, field
from typing import Any, Final

from hafl_app.fields import REQUIRED, choice, number, setting
from hafl_app.heads.settings import ClosedFormSettings

CLOSED_FORM: Final = "closed_form"
"""``model.head`` of a head that is solved from sums of features."""


@dataclass(frozen=True)
class BaseSpec:
    """Identity of a frozen base model: what decides its weights, and how texts become tokens.

    Parameters
    ----------
    path
        Hub name or local folder. Empty, with ``random_weights``: the model of ``shape``, or
        without that a built-in one of two layers for tests.
    revision
        Commit of the hub's repository; null: its newest.
    sha256
        SHA-256 that ``model.safetensors`` must have; null: unchecked.
    package_path
        ``package/folder`` of an installed package that carries the same files, used where the
        hub's cache has none; null: no such package. Or ``package/file.gguf``: the model's weights
        in fewer bits, used where the hub cannot be reached.
    package_sha256
        SHA-256 that the GGUF file of ``package_path`` must have; null: unchecked.
    num_layers
        Keep only so many layers, from the first; null: all.
    random_weights
        Random weights in the shape of ``path``'s configuration.
    pooling
        ``mean`` over tokens with a linear head, or ``cls``: the model's own classification head,
        as ``image_classification`` needs it. No meaning for ``causal_lm``.
    trust_remote_code
        Run Python code that the model's repository brings along: only for a repository whose code
        you have read, and only on nodes that allow it too. Without it such a model is refused.
    task
        ``classification`` of text, ``causal_lm``: answers to prompts, without a head, or
        ``image_classification``: images, and the model's own classifier is the head.
    shape
        Transformers configuration, with its ``model_type``, of a model with random weights and no
        ``path``. Its tokenizer hashes words. Null: the built-in model for tests.
    quantization
        Precision of the transformer blocks' weights: ``bf16``, ``int8`` or ``nf4`` (4
        bits), or ``none``, see docs/quantized.md. ``blockwise``: every node chooses for every
        block, by its own data, within ``memory_budget_mb``.
    dropout
        Train with the dropout of the base model's own configuration. False: without any, since its
        weights are frozen. ``lora.lora_dropout``, before the trained factors, is another matter.
    chat_template
        Chat template of conversations: ``instruction`` or ``chatml``, or a Jinja template itself;
        null: the model's own. A node renders a template of the run's own only with
        ``allow-remote-code``.
    """

    path: str = ""
    revision: str | None = None
    sha256: str | None = None
    package_path: str | None = None
    package_sha256: str | None = None
    num_layers: int | None = number(None, at_least=1)
    random_weights: bool = False
    pooling: str = choice("mean", "mean", "cls")
    trust_remote_code: bool = False
    task: str = choice("classification", "classification", "causal_lm", "image_classification")
    shape: dict[str, Any] | None = setting(None, hashed=False)
    quantization: str = choice("none", "none", "bf16", "int8", "nf4", "blockwise")
    dropout: bool = setting(False)
    chat_template: str | None = None

    @property
    def is_without_files(self) -> bool:
        """Whether the base has neither a folder nor a hub name: random weights and hashed words."""
        return self.random_weights and not self.path


@dataclass(frozen=True)
class ModelSettings(BaseSpec):
    """The frozen base model, and the head of a classifier.

    Parameters
    ----------
    name
        Name of the model in tables and files.
    head
        Treatment of the classification head: ``averaged`` over the clients, ``frozen`` as it
        was initialized, ``local``: each client trains and keeps its own, or ``closed_form``: solved
        from sums of all clients' features before round 1. No meaning for ``causal_lm``.
    head_refresh_every
        ``head: closed_form``: rounds between those after which the head is solved anew, from the
        features under the adapter of that round; 0: never.
    closed_form
        ``head: closed_form``: how the head is solved.
    query_value
        Ends of the names of the attention's query and value projections, which ``lora=query_value``
        adapts. Some models have one layer for both and the keys.
    memory_budget_mb
        MB (10^6 bytes) that the base model may take on a node under ``quantization: blockwise``;
        ``memory-mb`` in a node's config, a limit of everything in training, goes before it. Null:
        every node must state its own.
    """

    name: str = REQUIRED
    head: str = choice("averaged", "averaged", "frozen", "local", CLOSED_FORM)
    head_refresh_every: int = number(0, at_least=0)
    closed_form: ClosedFormSettings = field(default_factory=ClosedFormSettings)
    query_value: list[str] = field(default_factory=lambda: ["query", "value"], hash=False)
    memory_budget_mb: float | None = number(None, above=0)

    @property
    def asks_for_losses(self) -> bool:
        """Whether clients say which temperature of a solved head fits the rows they hold out."""
        return self.head == CLOSED_FORM and self.closed_form.asks_for_losses

    @property
    def title(self) -> str:
        """The name in tables and files, which says so if the weights are random."""
        is_told = not self.random_weights or "random" in self.name
        return self.name if is_told else f"{self.name}_random"


@dataclass
class LoraSettings:
    """The adapter.

    Parameters
    ----------
    max_rank
        Rank of the global adapter, which no client exceeds.
    lora_alpha
        PEFT's ``lora_alpha``: the scaling before it is divided, see ``scaling``.
    scaling
        ``constant``: lora_alpha / max_rank for every client; ``per_rank``: lora_alpha / rank;
        ``rslora``: lora_alpha / sqrt(rank).
    target_modules
        Modules that are adapted: a list of ends of names, or ``all-linear``.
    lora_dropout
        Share of the inputs of lora_A that is dropped in training.
    """

    max_rank: int = number(8, at_least=1)
    lora_alpha: float = number(16.0, above=0)
    scaling: str = choice("constant", "constant", "per_rank", "rslora")
    target_modules: Any = "all-linear"
    lora_dropout: float = number(0.0, at_least=0, below=1)


@dataclass(frozen=True)
class TrainOptions:
    """Options of a client's local training, the same for every strategy.

    Parameters
    ----------
    batch_size
        Examples per step.
    tokens_per_step
        For ``causal_lm``, targets of a step at least: batches are gathered until their answers have
        so many tokens, all of which count the same in its loss, and go through the model one after
        another. The last step of an epoch has what is left. 0: every batch is a step.
    micro_batch_size
        Examples that go through the model at once; their gradients add up to the batch's. Null:
        the whole batch.
    gradient_checkpointing
        Compute activations again in the backward pass instead of keeping them: less memory, more
        time.
    learning_rate
        Learning rate of ``lora_A`` and the head; the highest one under a ``client.schedule``.
    lora_B_lr_ratio
        Learning rate of ``lora_B`` over that of ``lora_A``.
    optimizer
        ``adamw`` or ``sgd``.
    weight_decay
        Decoupled weight decay. Never applied to frozen components.
    max_grad_norm
        The gradient's L2 norm is clipped to this; 0: never.
    max_seconds
        Seconds after which training ends, behind the step in which they are over, so that a slow
        device trains less instead of being late; 0: no limit. ``max-seconds`` in a node's config
        wins where it is smaller. A client that stopped early keeps the weight of all its data.
        The result then depends on the clock.
    precision
        ``fp32``, ``bf16``, or ``auto``: each machine by itself bf16 on processors with AVX-512-BF16
        or AMX and on CUDA from compute capability 8.0, else fp32. bf16 rounds the base model's
        frozen weights and the activations; factors, head and importance stay in float32.
    """

    batch_size: int = number(32, at_least=1)
    tokens_per_step: int = number(0, at_least=0)
    micro_batch_size: int | None = number(None, at_least=1)
    gradient_checkpointing: bool = setting(False, resumable=True)
    learning_rate: float = number(3e-3, above=0)
    lora_B_lr_ratio: float = number(1.0, above=0)
    optimizer: str = choice("adamw", "adamw", "sgd")
    weight_decay: float = number(0.0, at_least=0)
    max_grad_norm: float = number(1.0, at_least=0)
    max_seconds: float = number(0.0, at_least=0)
    precision: str = choice("auto", "auto", "fp32", "bf16")

    @property
    def texts_at_once(self) -> int:
        """Texts that go through the model at once, as long as memory suffices."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate from round to round, the same within one, see docs/schedules.md.

    Parameters
    ----------
    kind
        After the warm-up the rate is ``client.learning_rate`` throughout (``constant``), or falls
        from there to ``final`` in a straight line or a half ``cosine``.
    warmup_rounds
        First rounds, in which it climbs in equal steps to ``client.learning_rate``.
    final
        Share of ``client.learning_rate`` that it falls to, in the round that would follow the last.
    """

    kind: str = choice("constant", "constant", "linear", "cosine")
    warmup_rounds: int = number(0, at_least=0)
    final: float = number(0.0, at_least=0, at_most=1)

    @property
    def changes(self) -> bool:
        """Whether the rounds have different rates."""
        return self.kind != "constant" or self.warmup_rounds > 0


@dataclass(frozen=True)
class ClientSettings(TrainOptions):
    """Local training: its length, its options, and the device that it runs on.

    Parameters
    ----------
    local_epochs
        Passes over a client's data in a round.
    max_steps
        Most steps of a client in a round; 0: no limit. ``max-steps`` in a node's config wins
        where it is smaller. Privacy accounting is per round and does not see it.
    proximal
        FedProx: weight of a term ``proximal / 2 * ||w - w_sent||^2`` in the loss, over the trained
        factors and the head. 0: none. Clients that train alone and central training have none.
    logit_adjustment
        For skewed labels: ``tau`` of ``z_c + tau log n_c``, which the loss reads in place of the
        logit of class c, with the client's own n_c examples of it; a class that it does not have is
        left out. 1: balanced softmax; 0: a softmax over its own classes alone; null: plain cross
        entropy, which clients that train alone and central training always have. Classification
        only.
    schedule
        Learning rate from round to round.
    num_threads
        CPU threads of one client, as many at most as its process may use CPUs.
    device
        ``cpu``, ``cuda``, or ``auto``: CUDA where there is any.
    """

    local_epochs: int = number(1, at_least=1)
    max_steps: int = number(0, at_least=0)
    proximal: float = number(0.0, at_least=0)
    logit_adjustment: float | None = number(None, at_least=0)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    num_threads: int = number(1, at_least=1)
    device: str = choice("auto", "auto", "cpu", "cuda", resumable=True)
