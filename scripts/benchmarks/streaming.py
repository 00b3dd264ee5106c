"""A round of many clients whose training costs nothing: what the server needs to fold it.

Flower's messages, the judge and the strategy are the real ones, in process; the clients answer with
random numbers of the right shape.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.timing import DisagreementError
from hafl_app.config.compose import compose
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape, initial_adapter
from hafl_app.lowrank.svd import WeightedStack
from hafl_app.run import build
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.server.rounds import run_rounds
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.training.device import peak_memory_mb
from hafl_app.wire.arrays import Float32
from hafl_app.wire.node_profile import PROFILE, NodeProfile
from hafl_app.wire.records import (
    METRICS,
    NUM_EXAMPLES,
    AdapterArrays,
    adapter_content,
    read_adapter,
    read_plan,
)

TINYLLAMA = ("q_proj", 2048, 2048), ("v_proj", 256, 2048)
"""Name, out_features and in_features of the layers that LoRA adapts by default."""


@dataclass(frozen=True)
class Cost:
    """Time and memory of one round.

    Parameters
    ----------
    seconds
        Of the round, the clients' making up of numbers included.
    memory_mb
        Most resident memory in the round above what there was before it, 10^6 bytes.
    """

    seconds: float
    memory_mb: float


def shapes_of(layers: int, divide: int = 1) -> dict[str, ModuleShape]:
    """Return the adapted layers of TinyLlama-1.1B, or of one with fewer or narrower layers."""
    return {
        f"model.layers.{layer}.self_attn.{name}": ModuleShape(out // divide, width // divide)
        for layer in range(layers)
        for name, out, width in TINYLLAMA
    }


def measure_round(
    method: str, shapes: dict[str, ModuleShape], rank: int, num_clients: int, *, streaming: bool
) -> Cost:
    """Run one round and measure it; for a process of its own, whose peak counts."""
    with server_identity():
        strategy, grid = _federation(method, shapes, rank, num_clients, streaming=streaming)
        before = psutil.Process().memory_info().rss / 1e6
        started = time.perf_counter()
        run_rounds(strategy, grid, 1, lambda _: False)
        seconds = time.perf_counter() - started
    peak = peak_memory_mb(torch.device("cpu"))
    return Cost(seconds, max(0.0, peak - before))


def check_same(method: str, shapes: dict[str, ModuleShape], ranks: Sequence[int]) -> None:
    """Refuse to measure anything if a streamed round does not give the same adapter.

    By what each module adds to its weight, to 1e-6 of its norm.

    Raises
    ------
    DisagreementError
        Naming the method and the first module that differs.
    """
    adapters = []
    for streaming in (False, True):
        with server_identity():
            strategy, grid = _federation(method, shapes, max(ranks), 5, streaming=streaming)
            run_rounds(strategy, grid, 1, lambda _: False)
        adapters.append(strategy.global_adapter.modules)
    for name, factors in adapters[0].items():
        change = WeightedStack().append(factors, 1.0).append(adapters[1][name], -1.0).factors()
        if change.norm() > 1e-6 * factors.norm():
            raise DisagreementError(f"{method}: {name} is another one when streamed")


def _federation(
    method: str, shapes: dict[str, ModuleShape], rank: int, num_clients: int, *, streaming: bool
) -> tuple[HeterogeneousLora, InProcessGrid]:
    settings = compose(
        [
            f"strategy={method}",
            f"lora.max_rank={rank}",
            f"federation.streaming={str(streaming).lower()}",
            "federation.max_norm_ratio=null",
            "federation.num_rounds=1",
            "federation.fraction_evaluate=0.0",
        ]
    )
    strategy = build.strategy(settings)
    grid = InProcessGrid(_clients(rank, num_clients), num_clients)
    directory = NodeDirectory(60.0, num_nodes=num_clients, label_names=())
    strategy.coordinator.participation.wait_for_nodes(grid, directory)
    # lora_B starts at zero, and a mean of zeros would be equal for any fold.
    start = initial_adapter(shapes, rank, seed=1).modules
    generator = torch.Generator().manual_seed(2)
    modules = {
        n: LoraFactors(f.lora_A, torch.randn(f.lora_B.shape, generator=generator))
        for n, f in start.items()
    }
    strategy.coordinator.prepare(Adapter(modules), lambda _: None)
    return strategy, grid


def _clients(rank: int, num_clients: int) -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        profile = NodeProfile(number, num_clients, rank, _examples(number), "cpu")
        return Message(RecordDict({PROFILE: profile.to_record()}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        rng, plan = np.random.default_rng(number), read_plan(message.content)
        modules: dict[str, tuple[Float32, Float32]] = {}
        for name, (lora_A, lora_B) in read_adapter(message.content).modules.items():
            module = plan.modules[name]
            trained = len(module.trainable)
            height, width = module.uploaded_sides((lora_B.shape[0], lora_A.shape[1]))
            modules[name] = (
                rng.standard_normal((trained, width), np.float32),
                rng.standard_normal((height, trained), np.float32),
            )
        scores = {} if plan.importance == "none" else _scores(modules)
        metrics = MetricRecord({NUM_EXAMPLES: _examples(number), "loss": 1.0})
        content = adapter_content(AdapterArrays(modules, {}, scores), **{METRICS: metrics})
        return Message(content, reply_to=message)

    return app


def _examples(number: int) -> int:
    return 10 + number % 7


def _scores(modules: Mapping[str, tuple[Float32, Float32]]) -> dict[str, Float32]:
    return {name: np.ones(lora_A.shape[0], np.float32) for name, (lora_A, _) in modules.items()}
