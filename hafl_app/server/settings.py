"""Settings of the rounds: selection, evaluation, and what happens to bad or missing replies."""

from dataclasses import dataclass, field

from hafl_app.fields import choice, number, setting

_ADAPTIVE_RATE = 5e-3  # of FLASC's server Adam on LoRA factors, arXiv:2406.05233, 20 Newsgroups


@dataclass
class QuarantineSettings:
    """Quarantine of nodes whose replies are rejected.

    Parameters
    ----------
    after
        Rejected replies in a row after which a node is left out; no reply in time, or an error
        instead of one, counts as well. 0: never.
    rounds
        Rounds for which it is left out.
    """

    after: int = number(3, at_least=0)
    rounds: int = number(5, at_least=1)


@dataclass
class ServerOptimizerSettings:
    """A server optimizer: its step on a round's aggregated change, see docs/server_optimizers.md.

    Parameters
    ----------
    kind
        ``none``: the change itself; ``momentum``, ``adam`` or ``yogi`` on it.
    learning_rate
        Factor of the step. Null: 1 for ``momentum``, which then only adds up changes; 0.005 for
        ``adam`` and ``yogi``, whose step is about this large in every number whatever the change.
    beta1
        Decay of the first moment from round to round; the momentum.
    beta2
        Decay of the second moment; of ``adam`` and ``yogi``.
    tau
        Added to the second moment's root, and the root that it starts from; of ``adam`` and
        ``yogi``. Numbers that change by much less than this are hardly adapted.
    """

    kind: str = choice("none", "none", "momentum", "adam", "yogi")
    learning_rate: float | None = number(None, above=0)
    beta1: float = number(0.9, at_least=0, below=1)
    beta2: float = number(0.99, at_least=0, below=1)
    tau: float = number(1e-3, above=0)

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.kind == "momentum" else _ADAPTIVE_RATE


@dataclass
class EarlyStoppingSettings:
    """End of a run whose scores no longer get better, see docs/schedules.md.

    The score is that by which the best round is chosen. Last and best round are kept and scored as
    in any run.

    Parameters
    ----------
    patience
        Evaluations in a row without a gain after which the run ends. 0: it has all its rounds.
    min_delta
        What a score must be better by to be a gain, in units of its metric.
    """

    patience: int = number(0, at_least=0, resumable=True)
    min_delta: float = number(0.0, at_least=0, resumable=True)


@dataclass
class FederationSettings:
    """Rounds, selection, evaluation, and what happens when replies are bad or missing.

    Parameters
    ----------
    num_clients
        Clients of a simulation; nodes to wait for where they have data of their own.
    num_rounds
        Rounds, those of the run to resume included. 0, with ``model.head=closed_form``: the head
        alone, without adapters.
    fraction_train
        Share of the nodes that are selected for training in a round.
    fraction_evaluate
        Share of the nodes that evaluate the global adapter on their own data.
    evaluate_every
        Rounds between evaluations, by the nodes and on the server's validation data; round 0 and
        the last round are always evaluated.
    early_stopping
        End of the run before ``num_rounds``, when its scores no longer get better.
    test_every
        Rounds between evaluations on the test data, which choose nothing. 0: none but that of the
        last round and of the best one, after the end.
    central_evaluation
        Whether the server scores the global adapter. Without it the server needs no weights of
        the base model, and rounds are chosen by the clients' scores.
    unseen_clients
        Partitions, drawn by the seed, that never train and do not count in the clients' scores;
        after the last round they score what they would receive. 0: none.
    generate_examples
        Prompts of the test set that a causal language model answers after the last round, for
        Rouge-L and exact match. 0: none.
    generate_on_clients
        Prompts of its held-out rows that each client answers after the last round with what the
        method would send it, for Rouge-L and exact match: only these scores leave it. 0: none.
    generate_tokens
        Most tokens of a generated answer that is scored.
    generate_seconds
        Seconds after which a client writes no further answer.
    watch_prompts
        Prompts that the global adapter of a causal language model answers after each round that
        is evaluated, kept in ``answers.md``. Null: three of the test set, unless the base model's
        weights are random; an empty list: none.
    watch_tokens
        Most tokens of such an answer.
    alone_clients_per_rank
        Clients of every rank that are also trained alone, to measure what the federation gains
        them. 0: none. Each costs as much as its part of the whole federation.
    alone_at_max_rank
        Whether they train alone once more at ``lora.max_rank``, to separate the cost of
        their rank from that of their little data.
    score_device_ranks
        Whether the last round's adapter is also scored on the test data cut to the rank of each
        device, by its best approximation: a pass over the test data for every rank.
    partition_owner
        Owner of a partition, which one node at a time trains. ``connected``: a node that went
        offline frees its partition for another, so that one that restarts comes back. ``node``:
        the first node keeps it for the whole run, which is right where nodes are authenticated:
        Flower gives a registered key the same id each time it connects, and another node
        cannot take its place.
    round_timeout_s
        Seconds that a round waits for replies; stragglers that take longer count as missing.
    start_timeout_s
        Seconds until round 1 begins without the nodes that are missing; later ones join.
    min_replies
        A round with fewer replies that count is repeated with other nodes.
    max_retries
        Repetitions of a round; after them the run stops, with its last checkpoint.
    max_norm_ratio
        From five replies on, an update is rejected whose norm exceeds the round's median by more
        robust deviations than this; null: none is.
    quarantine
        Quarantine of nodes whose replies are rejected.
    robust
        Replacement of the mean of a component over its contributors: their coordinate-wise
        ``median``, or their ``trimmed_mean``. ``none``: the mean.
    trim_fraction
        ``robust: trimmed_mean``: share of the contributors that is cut off at either end.
    clip_ratio
        Updates are scaled down to this multiple of the round's median norm; null: not.
    weighting
        Weight of a client in averages: ``examples``, its number of training examples as it
        states it, or ``uniform``: every client the same.
    server_optimizer
        Optimizer of the server, which steps on the aggregated change.
    scaffold
        Whether every client's gradients are corrected by control variates, for ``client=sgd``
        without clipping, see docs/server_optimizers.md.
    max_examples_per_node
        Most examples that a node may count for; null: no limit. What it claims cannot be checked.
    max_examples_ratio
        From three nodes on, most examples that a node may count for, over the median of all nodes;
        null: no limit.
    streaming
        Whether replies are folded in as they arrive, in partition order, and dropped, instead of
        held until the round is complete. ``robust``, ``max_norm_ratio`` and ``clip_ratio`` see a
        whole round at once and must be off.
    stream_buffer
        ``streaming``: most replies that the server holds at once.
    upload
        Numbers that the factors are uploaded in: ``fp32``; or their change against what was sent
        in ``bf16``, in ``int8`` with a scale for every component, or in ``mixed`` with bits of its
        own for every component, which only ``strategy=haflq`` allocates. The head stays fp32.
    error_feedback
        Whether a client keeps what rounding lost of a component and adds it to that component's
        next change. Null: wherever that has a meaning; true is refused where it has none.
    checkpoint_every
        Rounds between checkpoints; 0: none is written.
    cohort
        Clients that train together in a simulation: the frozen base model's products are computed
        once for the rows of all, and the results are those of one at a time up to rounding.
        ``auto``: with ``engine=inprocess`` several if a measurement at the start of the run says
        that it pays, with ``engine=ray`` one at a time; what is chosen stands in ``summary.json``
        and holds when the run is resumed. ``1``: one at a time.
    server_threads
        Threads that score the global adapter; null: ``client.num_threads``.
    client_cpus
        CPUs of one simulated client; null: ``client.num_threads``.
    client_gpus
        GPUs of one simulated client, in shares of one; null: found by looking at the machine.
    ray_address
        Ray cluster to simulate on, host:port; null: that of the environment's RAY_ADDRESS, else a
        Ray of the run's own.
    """

    num_clients: int = number(10, at_least=1)
    num_rounds: int = number(10, at_least=0, resumable=True)
    fraction_train: float = number(1.0, above=0, at_most=1)
    fraction_evaluate: float = number(1.0, at_least=0, at_most=1, resumable=True)
    evaluate_every: int = number(1, at_least=1, resumable=True)
    early_stopping: EarlyStoppingSettings = field(default_factory=EarlyStoppingSettings)
    test_every: int = number(0, at_least=0, resumable=True)
    central_evaluation: bool = setting(True, resumable=True)
    unseen_clients: int = number(0, at_least=0)
    generate_examples: int = number(0, at_least=0, resumable=True)
    generate_on_clients: int = number(0, at_least=0, resumable=True)
    generate_tokens: int = number(64, at_least=1, resumable=True)
    generate_seconds: float = number(120.0, above=0, resumable=True)
    watch_prompts: list[str] | None = setting(None, resumable=True)
    watch_tokens: int = number(48, at_least=1, resumable=True)
    alone_clients_per_rank: int = number(0, at_least=0, resumable=True)
    alone_at_max_rank: bool = setting(False, resumable=True)
    score_device_ranks: bool = setting(False, resumable=True)
    partition_owner: str = choice("connected", "connected", "node")
    round_timeout_s: float = number(3600.0, above=0, resumable=True)
    start_timeout_s: float = number(600.0, above=0, resumable=True)
    min_replies: int = number(1, at_least=1, resumable=True)
    max_retries: int = number(2, at_least=0, resumable=True)
    max_norm_ratio: float | None = number(10.0, above=0)
    quarantine: QuarantineSettings = field(default_factory=QuarantineSettings)
    robust: str = choice("none", "none", "median", "trimmed_mean")
    trim_fraction: float = number(0.2, above=0, below=0.5)
    clip_ratio: float | None = number(None, above=0)
    weighting: str = choice("examples", "examples", "uniform")
    server_optimizer: ServerOptimizerSettings = field(default_factory=ServerOptimizerSettings)
    scaffold: bool = False
    max_examples_per_node: int | None = number(None, at_least=1)
    max_examples_ratio: float | None = number(10.0, at_least=1)
    streaming: bool = False
    stream_buffer: int = number(16, at_least=1)
    upload: str = choice("fp32", "fp32", "bf16", "int8", "mixed")
    error_feedback: bool | None = None
    checkpoint_every: int = number(1, at_least=0, resumable=True)
    cohort: str = setting("auto", resumable=True)
    server_threads: int | None = number(None, at_least=1, resumable=True)
    client_cpus: int | None = number(None, at_least=1, resumable=True)
    client_gpus: float | None = number(None, at_least=0, resumable=True)
    ray_address: str | None = setting(None, resumable=True)

    @property
    def cohort_clients(self) -> int | None:
        """Clients that are to train together; None for ``auto``."""
        return int(self.cohort) if self.cohort.isdecimal() else None
