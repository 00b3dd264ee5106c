"""Bytes of a round's messages, by method, rank and numbers, beside those of the factors alone.

The messages are those that a federation sends, made and judged by the same code; only training is
replaced by noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from benchmarks.timing import DisagreementError
from hafl_app.config.compose import compose
from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape, initial_adapter
from hafl_app.plan_parts.number_formats import NUMBER_BYTES, NumberFormat
from hafl_app.privacy.mechanism import trained_part
from hafl_app.run import build
from hafl_app.server.round_messages import RoundMessages
from hafl_app.server.traffic import Ledger
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.training.adapter_arrays import from_arrays
from hafl_app.wire.arrays import Float32
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import (
    HEAD_PREFIX,
    METRICS,
    NUM_EXAMPLES,
    adapter_content,
    message_bytes,
    read_adapter,
    read_plan,
)
from hafl_app.wire.uploads import encode_upload

METHODS: Mapping[str, Sequence[str]] = {
    "hafl": ("strategy=hafl",),
    "hafl, truncation": ("strategy=hafl", "strategy.scheme=truncation"),
    "hetlora": ("strategy=hetlora",),
    "flexlora": ("strategy=flexlora",),
    "zero_padding": ("strategy=zero_padding",),
    "fedit": ("strategy=fedit",),
}
"""Overrides by the name of what is measured."""

_NUM_LABELS, _WIDTH, _WIDER = 77, 384, 1536  # BANKING77's classes; MiniLM's layers
_CHANGE = 1e-2  # of a number in training, beside a state of about 1
_NODE, _EXAMPLES = 7, 120
# A training reply's metrics, with numbers as they come.
_METRICS: Mapping[str, float] = {
    NUM_EXAMPLES: _EXAMPLES,
    "loss": 1.2345678,
    "steps": 4,
    "seconds": 1.2345678,
    "probe-seconds": 0.0,
    "peak-memory-mb": 1234.5678,
    "micro-batch-size": 32,
    "out-of-time": 0,
}


@dataclass(frozen=True)
class Sizes:
    """Bytes of one message.

    Parameters
    ----------
    sent
        All that travels, without the head.
    ideal
        The factors' numbers alone.
    head
        Bytes of the head, its arrays' descriptions included.
    """

    sent: int
    ideal: int
    head: int

    @property
    def overhead(self) -> float:
        """Share of the bytes beyond the numbers of the factors."""
        return self.sent / self.ideal - 1


@dataclass(frozen=True)
class Measured:
    """Sizes of one client's request and reply in a round."""

    method: str
    rank: int
    upload: NumberFormat
    down: Sizes
    up: Sizes

    def row(self) -> dict[str, str]:
        """Return a line of the table."""
        row = {"method": self.method, "rank": str(self.rank), "upload": self.upload}
        for way, sizes in (("down", self.down), ("up", self.up)):
            row[f"{way}, bytes"] = f"{sizes.sent:,}"
            row[f"{way}, ideal"] = f"{sizes.ideal:,}"
            row[f"{way}, over"] = f"{sizes.overhead:.2%}"
            row[f"{way}, head"] = f"{sizes.head:,}"
        return row


def minilm_shapes(num_layers: int) -> dict[str, ModuleShape]:
    """Return the layers of MiniLM-L6 that `lora=all_linear` adapts, of its first layers."""
    narrow = ("attention.self.query", "attention.self.key", "attention.self.value")
    shapes = {}
    for layer in range(num_layers):
        prefix = f"encoder.layer.{layer}."
        for name in (*narrow, "attention.output.dense"):
            shapes[prefix + name] = ModuleShape(_WIDTH, _WIDTH)
        shapes[f"{prefix}intermediate.dense"] = ModuleShape(_WIDER, _WIDTH)
        shapes[f"{prefix}output.dense"] = ModuleShape(_WIDTH, _WIDER)
    return shapes


def measure_all(
    methods: Sequence[str],
    ranks: Sequence[int],
    uploads: Sequence[NumberFormat],
    shapes: Mapping[str, ModuleShape],
    max_rank: int,
) -> Iterator[Measured]:
    """Measure every combination; see `measure`."""
    for method in methods:
        for rank in ranks:
            for upload in uploads:
                yield measure(method, rank, upload, shapes, max_rank)


def measure(
    method: str,
    rank: int,
    upload: NumberFormat,
    shapes: Mapping[str, ModuleShape],
    max_rank: int,
) -> Measured:
    """Measure one client's request and reply.

    Parameters
    ----------
    method
        One of `METHODS`.
    rank
        The client's budget, at most ``max_rank``.

    Raises
    ------
    benchmarks.timing.DisagreementError
        If either side does not get what the other meant, to the error that rounding may make.
    """
    strategy = in_mid_run(METHODS[method], upload, shapes, max_rank)
    return measure_client(method, strategy, NodeProfile(0, 1, rank, _EXAMPLES, "cpu"))


def measure_client(method: str, strategy: HeterogeneousLora, profile: NodeProfile) -> Measured:
    """Measure the request that a strategy makes for a client, and the reply; see `measure`."""
    profile = replace(profile, node_id=_NODE)
    plan = strategy.plan(profile, 1)
    upload = plan.upload
    exchange = RoundMessages(Ledger(), 1, MessageType.TRAIN)
    with server_identity():
        (request,) = exchange.messages([profile], [plan], strategy.dispatch, MessageType.TRAIN)
        request.metadata.__dict__["_message_id"] = "1"  # as a grid does when it sends one
        reply, trained = _answer(request)
    (validated,) = exchange.validate_training([reply])
    if validated.update is None:
        raise DisagreementError(
            f"{method}, rank {profile.rank}, {upload}: rejected: {validated.error}"
        )
    got = validated.update.adapter
    _check(got, _first_components(trained, got), validated.update.before, upload)
    shapes = {
        n: (f.out_features, f.in_features) for n, f in strategy.global_adapter.modules.items()
    }
    held = sum(len(module.held) * sum(shapes[name]) for name, module in plan.modules.items())
    return Measured(
        method,
        profile.rank,
        upload,
        _sizes(request, NUMBER_BYTES["fp32"] * held),
        _sizes(reply, plan.upload_bytes(shapes)),
    )


def in_mid_run(
    overrides: Sequence[str],
    upload: NumberFormat,
    shapes: Mapping[str, ModuleShape],
    max_rank: int,
) -> HeterogeneousLora:
    """Return a method in the middle of a run: with importance scores, where it uses any."""
    settings = compose([*overrides, f"lora.max_rank={max_rank}", f"federation.upload={upload}"])
    strategy = build.strategy(settings)
    generator = torch.Generator().manual_seed(0)
    modules = initial_adapter(shapes, max_rank, seed=0).modules
    strategy.global_adapter = Adapter(
        {
            name: LoraFactors(f.lora_A, torch.randn(f.lora_B.shape, generator=generator))
            for name, f in modules.items()
        },
        {
            "weight": torch.randn(_NUM_LABELS, _WIDTH, generator=generator),
            "bias": torch.randn(_NUM_LABELS, generator=generator),
        },
    )
    scores = {n: torch.rand(max_rank, generator=generator, dtype=torch.float64) for n in shapes}
    strategy.recall({"scores": scores})
    return strategy


def _answer(request: Message) -> tuple[Message, Adapter]:
    """Answer as a client does, with noise for training; return the reply and its adapter."""
    plan, arrays = read_plan(request.content), read_adapter(request.content)
    received = from_arrays(arrays.modules, arrays.head)
    generator = torch.Generator().manual_seed(1)
    before = trained_part(received, plan).tensors()
    trained = Adapter.from_tensors(
        {
            name: tensor + _CHANGE * torch.randn(tensor.shape, generator=generator)
            for name, tensor in before.items()
        }
    )
    scores = _scores(trained, generator) if plan.importance != "none" else {}
    upload, _ = encode_upload(trained, received, plan, scores, {})
    content = adapter_content(upload, **{METRICS: MetricRecord(dict(_METRICS))})
    slots = {name: module.trainable_slots for name, module in plan.modules.items()}
    sent = Adapter({n: f.select(slots[n]) for n, f in received.modules.items()})
    return Message(content, reply_to=request), trained.filled(sent)


def _scores(trained: Adapter, generator: torch.Generator) -> dict[str, Float32]:
    """Return a score for every component, in the order of the model's modules, as clients do."""
    return {
        name: torch.rand(factors.rank, generator=generator).numpy()
        for name, factors in trained.modules.items()
    }


def _first_components(trained: Adapter, like: Adapter) -> Adapter:
    """Return as many components of every module as another adapter has."""
    ranks = {name: factors.rank for name, factors in like.modules.items()}
    modules = {n: f.select(range(ranks[n])) for n, f in trained.modules.items()}
    return Adapter(modules, trained.head)


def _check(got: Adapter, meant: Adapter, before: Adapter, upload: NumberFormat) -> None:
    """Refuse a result that rounding the change does not explain."""
    expected, sent = meant.tensors(), before.tensors()
    for name, tensor in got.tensors().items():
        change = (expected[name] - sent[name]).abs()
        numbers: NumberFormat = "fp32" if name.startswith("head/") else upload
        allowed = _rounding(change, numbers, by_column=name.startswith("lora_B/"))
        if numbers != "fp32":  # the sum of what was sent and the change is rounded as well
            allowed = allowed + 2**-22 * expected[name].abs()
        if not bool(((tensor - expected[name]).abs() <= allowed).all()):
            raise DisagreementError(f"{name}: differs by more than {numbers} explains")


def _rounding(change: torch.Tensor, numbers: NumberFormat, *, by_column: bool) -> torch.Tensor:
    """Return the largest error that each number may have."""
    if numbers == "fp32":
        return torch.zeros_like(change)
    if numbers == "bf16":
        return 2**-8 * change
    largest = change.amax(0 if by_column else 1, keepdim=True)
    if numbers == "mixed":  # of 2 bits
        return largest
    return largest / 254 * (1 + 2**-7)


def _sizes(message: Message, ideal: int) -> Sizes:
    without = {
        name: ArrayRecord({k: a for k, a in record.items() if not k.startswith(HEAD_PREFIX)})
        if isinstance(record, ArrayRecord)
        else record
        for name, record in message.content.items()
    }
    with server_identity():
        sent = message_bytes(Message(RecordDict(without), _NODE, MessageType.TRAIN))
    return Sizes(sent, ideal, message_bytes(message) - sent)
