"""Schema of `conf/`: every setting with its type, default, unit and range.

Hydra merges the files of `conf/` into these dataclasses, so a wrong key or type fails when the
settings are composed. Ranges stand in the fields' metadata and are checked by
`hafl_app.config.compose`.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from hafl_app.fields import choice, number


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

    name: str = MISSING
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
class DatasetSettings:
    """Labeled text or images. `max_examples` limits the training set, for quick runs (null: all).

    With an `answer_column` the data are prompts and answers, for `model.task=causal_lm`: `template`
    makes the prompt of the other columns, each in braces, and leaves out a paragraph whose columns
    are all blank. `label_column` is then the category (empty: none). A row is cut to `max_length`
    tokens; where that leaves nothing of the answer it is left out.

    `validation_fraction` of the training data never reaches a client and serves for choosing
    rounds and learning rates; each client keeps `holdout_fraction` of its own data for evaluation.

    `label_names` are the classes in their order (null: those of the data). With `on_device` each
    node has a file of its own, named by its operator: `max_examples` then limits each node's rows,
    there is no validation split, `test_path` is a file on the server (null: it scores nothing), and
    null `label_names` are all that the nodes have before round 1.
    """

    source: str = choice(
        MISSING,
        "banking77",
        "newsgroups",
        "dolly",
        "gsm8k",
        "natural_instructions",
        "local",
        "synthetic",
        "digits",
        "on_device",
    )
    path: str | None = None
    test_path: str | None = None
    hub: str | None = None
    revision: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    answer_column: str | None = None
    template: str | None = None
    label_names: list[str] | None = None
    max_length: int = number(64, at_least=4)
    max_examples: int | None = number(None, at_least=1)
    max_test_examples: int | None = number(None, at_least=1)
    validation_fraction: float = number(0.1, at_least=0, below=1)
    holdout_fraction: float = number(0.1, at_least=0, below=1)
    num_train: int = number(4000, at_least=40)
    num_test: int = number(1000, at_least=20)
    data_seed: int = number(0, at_least=0)


@dataclass
class PartitionSettings:
    """How the training data is shared out: flwr-datasets' partitioners."""

    kind: str = choice("iid", "iid", "dirichlet", "pathological", "natural")
    dirichlet_alpha: float = number(0.5, above=0)
    classes_per_partition: int = number(5, at_least=1)
    column: str | None = None
    min_examples: int = number(4, at_least=2)


@dataclass
class RankTier:
    """A class of devices: its rank budget and its share of the clients.

    `rank_pattern` gives layer types their own rank, like PEFT's setting of that name: a regular
    expression for the module's name, or for an end of it after a dot, to the rank.
    """

    rank: int = MISSING
    share: float = MISSING
    rank_pattern: dict[str, int] = field(default_factory=dict)


@dataclass
class RanksSettings:
    """Rank budgets of nodes whose `--node-config` has no `rank`.

    `tiers` are scaled to the number of clients; `order` is `ascending` (the first partitions are
    the weakest) or `shuffled` by the seed.

    With `source` `memory` each node takes the largest rank up to its tier's whose training step
    fits into its memory, of which the share `memory_margin` stays free. `memory_limit_mb` (MB of
    10^6 bytes; `memory-mb` in a node's config goes before it) limits the whole process on a CPU
    and the tensors on a GPU; null is what is free when the node is asked, so that the ranks of two
    runs may differ.
    """

    tiers: list[RankTier] = MISSING
    order: str = choice("ascending", "ascending", "shuffled")
    source: str = choice("tiers", "tiers", "memory")
    memory_margin: float = number(0.1, at_least=0, below=1)
    memory_limit_mb: int | None = number(None, at_least=1)


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


@dataclass
class QuarantineSettings:
    """Leave a node out for `rounds` rounds once `after` replies in a row were refused (0: never).

    No reply in time, or an error instead of one, counts as well.
    """

    after: int = number(3, at_least=0)
    rounds: int = number(5, at_least=1)


@dataclass
class FederationSettings:
    """Rounds, sampling, evaluation, and what happens when replies are bad or missing.

    A round with fewer than `min_replies` replies that count is repeated with other nodes, up to
    `max_retries` times; then the run stops, with its last checkpoint. `checkpoint_every` rounds
    the run's state is written (0: never).

    From five replies on, an update whose norm exceeds the round's median by more than
    `max_norm_ratio` robust deviations is refused (null: none is). `robust` replaces the mean of a
    component over its contributors by their coordinate-wise `median`, or by the mean of what is
    left when `trim_fraction` is cut off at either end. `clip_ratio` scales every update down to
    that multiple of the round's median norm (null: not).

    With `streaming` replies are folded in as they arrive, in partition order, and dropped: the
    server then holds `stream_buffer` of them and not a whole round. What must see all of a round at
    once (`robust`, `max_norm_ratio`, `clip_ratio`) must be off.

    `upload` is what numbers the factors are uploaded in: `fp32`; or their change against what was
    sent in `bf16`, in `int8` with a scale for every component, or in `mixed` with bits of its own
    for every component, which only `strategy=haflq` allocates. With `error_feedback` a client
    keeps what rounding lost of a component and adds it to that component's next change (null:
    wherever that has a meaning; true: the run is refused where it has none). The head stays fp32.

    Round 1 begins when all nodes are there, at the latest after `start_timeout_s`; later ones join.
    Nodes with data of their own do not know how many they are: all means `num_clients` then.

    `client_cpus` and `client_gpus` are the share of one simulated client; null means found by
    looking at the machine. `ray_address` is a Ray cluster to simulate on, host:port (null: that of
    the environment's RAY_ADDRESS, else a Ray of the run's own). `server_threads` score the global
    adapter (null: one per CPU).

    Without `central_evaluation` the server scores nothing itself and needs no weights of the base
    model; rounds are then chosen by the clients' scores.

    `unseen_clients` partitions, drawn by the seed, never train and do not count in the clients'
    scores; after the last round they score what they would receive (0: there are none).

    With `generate_examples` above 0 a causal language model answers that many prompts of the test
    set after the last round, in `generate_tokens` tokens at most, for Rouge-L and exact match.

    `alone_clients_per_rank` clients of every rank are also trained alone, to measure what the
    federation gains them (0: none); with `alone_at_max_rank` once more at `lora.max_rank`, to
    tell what the rank costs them from what the little data costs.
    """

    num_clients: int = number(10, at_least=1)
    num_rounds: int = number(10, at_least=1)
    fraction_train: float = number(1.0, above=0, at_most=1)
    fraction_evaluate: float = number(1.0, at_least=0, at_most=1)
    evaluate_every: int = number(1, at_least=1)
    central_evaluation: bool = True
    unseen_clients: int = number(0, at_least=0)
    generate_examples: int = number(0, at_least=0)
    generate_tokens: int = number(64, at_least=1)
    alone_clients_per_rank: int = number(1, at_least=0)
    alone_at_max_rank: bool = False
    round_timeout_s: float = number(3600.0, above=0)
    start_timeout_s: float = number(600.0, above=0)
    min_replies: int = number(1, at_least=1)
    max_retries: int = number(2, at_least=0)
    max_norm_ratio: float | None = number(10.0, above=0)
    quarantine: QuarantineSettings = field(default_factory=QuarantineSettings)
    robust: str = choice("none", "none", "median", "trimmed_mean")
    trim_fraction: float = number(0.2, above=0, below=0.5)
    clip_ratio: float | None = number(None, above=0)
    streaming: bool = False
    stream_buffer: int = number(16, at_least=1)
    upload: str = choice("fp32", "fp32", "bf16", "int8", "mixed")
    error_feedback: bool | None = None
    checkpoint_every: int = number(1, at_least=0)
    server_threads: int | None = number(None, at_least=1)
    client_cpus: int | None = number(None, at_least=1)
    client_gpus: float | None = number(None, at_least=0)
    ray_address: str | None = None


@dataclass
class TrackingSettings:
    """Where metrics go beside `metrics.jsonl` and the terminal."""

    kind: str = choice("jsonl", "jsonl", "wandb", "none")
    project: str = "hafl"
    entity: str | None = None
    mode: str = choice("online", "online", "offline")


@dataclass
class PrivacySettings:
    """Differential privacy of the adapter; see docs/privacy.md for what it covers.

    `central_dp`: the server clips each client's update to norm `clip_norm` and adds Gaussian noise
    of `noise_multiplier` times that to the sum. `local_dp`: each client does so before it
    uploads. The run stops when `max_epsilon` at `delta` would be exceeded (null: it is only
    reported). `noise_seed` null draws the noise from the system; a number makes a simulation
    repeatable, and its noise no secret.
    """

    kind: str = choice("none", "none", "central_dp", "local_dp")
    clip_norm: float = number(1.0, above=0)
    noise_multiplier: float = number(1.0, above=0)
    delta: float = number(1e-5, above=0, below=1)
    max_epsilon: float | None = number(None, above=0)
    noise_seed: int | None = number(None, at_least=0)


@dataclass
class MethodSettings:
    """One line of a comparison: overrides on top of the experiment's.

    `learning_rate` is used when the grid is not searched (null: `client.learning_rate`).
    `equal_mean_bytes` names another method: this one then trains at the one rank whose mean bytes
    per client, up and down, head included, come closest to that method's from below.
    """

    overrides: list[str] = field(default_factory=list)
    learning_rate: float | None = number(None, above=0)
    equal_mean_bytes: str | None = None


@dataclass
class TuningSettings:
    """Search for each method's learning rate, on a seed that the comparison does not use.

    The highest validation accuracy after `num_rounds` rounds (null: as many as the comparison)
    wins. `per_cell` searches in every cell; otherwise only in the first, for all.
    """

    learning_rates: list[float] = field(default_factory=list)
    seed: int = number(1000, at_least=0)
    num_rounds: int | None = number(None, at_least=1)
    per_cell: bool = False


@dataclass
class CompareSettings:
    """What `scripts/compare.py` runs; a single federation does not look at it.

    `methods` and `cells` have names without spaces; a cell is a list of overrides, and every
    method runs in every cell. `baseline` is the method whose final accuracy the others are timed
    to.
    """

    baseline: str = ""
    methods: dict[str, MethodSettings] = field(default_factory=dict)
    cells: dict[str, list[str]] = field(default_factory=dict)
    tuning: TuningSettings = field(default_factory=TuningSettings)


@dataclass
class Settings:
    """All settings of a run. `output_dir` null means `outputs/<date>/<time>-<strategy>`.

    `resume` is the folder of an earlier run, whose last checkpoint this one goes on from.
    """

    strategy: Any = MISSING
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    ranks: RanksSettings = field(default_factory=RanksSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)
    seed: int = number(0, at_least=0)
    engine: str = choice("ray", "ray", "inprocess")
    output_dir: str | None = None
    resume: str | None = None
