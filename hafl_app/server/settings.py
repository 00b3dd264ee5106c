"""Settings of the rounds: selection, evaluation, and what happens to bad or missing replies."""

from dataclasses import dataclass, field

from hafl_app.fields import choice, number


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

    A client's weight in averages is its number of training examples, as it states it, but at most
    `max_examples_per_node` (null: no limit of yours) and, from five nodes on, `max_examples_ratio`
    times the median of all nodes (null: no such bound): what a node claims cannot be checked. With
    `weighting` `uniform` every client weighs the same.

    With `streaming` replies are folded in as they arrive, in partition order, and dropped: the
    server then holds `stream_buffer` of them and not a whole round. What must see all of a round at
    once (`robust`, `max_norm_ratio`, `clip_ratio`) must be off.

    `upload` is what numbers the factors are uploaded in: `fp32`; or their change against what was
    sent in `bf16`, in `int8` with a scale for every component, or in `mixed` with bits of its own
    for every component, which only `strategy=haflq` allocates. With `error_feedback` a client
    keeps what rounding lost of a component and adds it to that component's next change (null:
    wherever that has a meaning; true: the run is refused where it has none). The head stays fp32.

    A partition is trained by one node. With `partition_owner` `connected` a node that went offline
    frees its partition for another, so that one that restarts comes back; with `node` the first
    node keeps it for the whole run, which is right where nodes are authenticated: Flower gives a
    registered key the same id each time it connects, and a stranger cannot take its place.

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
    partition_owner: str = choice("connected", "connected", "node")
    round_timeout_s: float = number(3600.0, above=0)
    start_timeout_s: float = number(600.0, above=0)
    min_replies: int = number(1, at_least=1)
    max_retries: int = number(2, at_least=0)
    max_norm_ratio: float | None = number(10.0, above=0)
    quarantine: QuarantineSettings = field(default_factory=QuarantineSettings)
    robust: str = choice("none", "none", "median", "trimmed_mean")
    trim_fraction: float = number(0.2, above=0, below=0.5)
    clip_ratio: float | None = number(None, above=0)
    weighting: str = choice("examples", "examples", "uniform")
    max_examples_per_node: int | None = number(None, at_least=1)
    max_examples_ratio: float | None = number(10.0, at_least=1)
    streaming: bool = False
    stream_buffer: int = number(16, at_least=1)
    upload: str = choice("fp32", "fp32", "bf16", "int8", "mixed")
    error_feedback: bool | None = None
    checkpoint_every: int = number(1, at_least=0)
    server_threads: int | None = number(None, at_least=1)
    client_cpus: int | None = number(None, at_least=1)
    client_gpus: float | None = number(None, at_least=0)
    ray_address: str | None = None
