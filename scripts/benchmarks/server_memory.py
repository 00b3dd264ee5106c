"""Memory of a server whose base model is known by its configuration alone.

The whole server runs, from its settings to the saved adapter: `hafl_app.run.federation.run` in this
process. Its clients answer with what they received and small noise, under any plan.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.timing import DisagreementError
from hafl_app.config.compose import SettingsError, compose
from hafl_app.config.files import CONF
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.svd import WeightedStack
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run.checks import check_settings
from hafl_app.run.federation import run
from hafl_app.training.adapter_arrays import from_arrays
from hafl_app.training.choosing import chosen_plan
from hafl_app.training.device import peak_memory_mb
from hafl_app.wire.node_profile import PROFILE, NodeProfile
from hafl_app.wire.records import (
    METRICS,
    NUM_EXAMPLES,
    STEPS,
    adapter_content,
    read_adapter,
    read_plan,
)
from hafl_app.wire.uploads import encode_upload

STRATEGIES = tuple(sorted(path.stem for path in (CONF / "strategy").glob("*.yaml")))
_NOISE = 1e-3
_ROWS = 24  # of a table that stands for the data, which are not trained on
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Peak:
    """Peak memory of a server's process, in MB of 10^6 bytes.

    Parameters
    ----------
    imports
        Held before the run, with everything imported.
    start
        Most before round 1, above the imports.
    rounds
        Most until the last round was over, above the imports.
    end
        Most until the results were written, above the imports.
    """

    imports: float
    start: float
    rounds: float
    end: float


class WeightsLoadedError(RuntimeError):
    """A server that has loaded the base model's weights."""


def streaming_strategies(model: Sequence[str], rank: int) -> dict[str, str]:
    """Return why each strategy cannot stream a federation of a causal model; empty if it can.

    Parameters
    ----------
    model
        Overrides that name the model.
    """
    found = {}
    for name in STRATEGIES:
        try:
            check_settings(compose(_overrides(name, model, rank, Path("data.jsonl"))))
        except SettingsError as error:
            found[name] = str(error)
        else:
            found[name] = ""
    return found


def measure(strategy: str, model: Sequence[str], rank: int, clients: int) -> Peak:
    """Run one round and measure it; for a process of its own, whose peak counts.

    Raises
    ------
    WeightsLoadedError
        If the server asks for the base model's weights.
    """
    imports = psutil.Process().memory_info().rss / 1e6
    peaks: list[float] = []

    def note(*_: object) -> None:
        peaks.append(peak_memory_mb(_CPU) - imports)

    refused = WeightsLoadedError(f"{strategy}: the server loads the base model's weights")
    with mock.patch("hafl_app.training.lora_model.load_base", side_effect=refused):
        _run_rounds(strategy, model, rank, clients, note)
    note()
    return Peak(imports, *peaks)


def check_same(strategy: str, rank: int = 4, clients: int = 2) -> None:
    """Refuse to measure a strategy that does not give the same adapter when it streams.

    On a tiny model, by what each module adds to its weight, to 1e-6 of its norm.

    Raises
    ------
    DisagreementError
        Naming the strategy and the first module that differs.
    """
    ends: list[Adapter] = []
    for streaming in (False, True):
        found: list[Adapter] = []
        _run_rounds(
            strategy,
            ["model=tiny_random_causal"],
            rank,
            clients,
            lambda _, adapter, found=found: found.append(adapter),  # type: ignore[misc]
            streaming=streaming,
        )
        ends.append(found[-1])
    for name, factors in ends[0].modules.items():
        change = WeightedStack().append(factors, 1.0).append(ends[1].modules[name], -1.0).factors()
        if change.norm() > 1e-6 * factors.norm():
            raise DisagreementError(f"{strategy}: {name} is another one when streamed")


def _overrides(
    strategy: str, model: Sequence[str], rank: int, table: Path, *, streaming: bool = True
) -> list[str]:
    return [
        f"strategy={strategy}",
        *model,
        f"lora.max_rank={rank}",
        "dataset=instructions",
        f"dataset.path={table}",
        f"federation.streaming={str(streaming).lower()}",
        "federation.max_norm_ratio=null",
        "federation.central_evaluation=false",
        "federation.fraction_evaluate=0.0",
        "federation.num_rounds=1",
        "engine=inprocess",
    ]


def _run_rounds(
    strategy: str,
    model: Sequence[str],
    rank: int,
    clients: int,
    on_round: Callable[[int, Adapter], None],
    *,
    streaming: bool = True,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = folder / "data.jsonl"
        rows = [{"instruction": f"say {i}", "input": "", "output": f"it {i}"} for i in range(_ROWS)]
        table.write_text("\n".join(map(json.dumps, rows)))
        overrides = _overrides(strategy, model, rank, table, streaming=streaming)
        overrides += [f"federation.num_clients={clients}", f"output_dir={folder / 'run'}"]
        grid = InProcessGrid(_clients(rank, clients), clients)
        with server_identity(), _silence():
            run(grid, compose(overrides), overrides=overrides, on_round=on_round)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield


def _clients(rank: int, clients: int) -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        profile = NodeProfile(number, clients, rank, 10 + number, "cpu")
        return Message(RecordDict({PROFILE: profile.to_record()}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        return Message(_answer(message.content, number), reply_to=message)

    return app


def _answer(content: RecordDict, number: int) -> RecordDict:
    """Return an upload under the plan of a request: the trained components with small noise."""
    arrays = read_adapter(content)
    received = from_arrays(arrays.modules, arrays.head)
    generator = torch.Generator().manual_seed(number)
    asked = read_plan(content)
    plan = chosen_plan(asked, _scores(asked, generator), number)
    modules = {
        name: _trained(plan.modules[name], factors, generator)
        for name, factors in received.modules.items()
    }
    scores = {} if plan.importance == "none" else _scores(plan, generator)
    upload, _ = encode_upload(
        Adapter(modules, received.head if plan.uploads_head else {}),
        received,
        plan,
        {name: values.numpy() for name, values in scores.items()},
        {},
        number,
    )
    metrics = MetricRecord({NUM_EXAMPLES: 10 + number, STEPS: 1, "loss": 1.0})
    return adapter_content(upload, **{METRICS: metrics})


def _scores(plan: TrainPlan, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        name: torch.rand(len(module.trainable), generator=generator)
        for name, module in plan.modules.items()
    }


def _trained(module: ModulePlan, factors: LoraFactors, generator: torch.Generator) -> LoraFactors:
    before = factors.select(module.trainable_slots)
    if module.own_lora_B:  # a client's own lora_B never travels
        before = LoraFactors(before.lora_A, before.lora_A.new_zeros(0, before.rank))
    return LoraFactors(
        before.lora_A + _NOISE * torch.randn(before.lora_A.shape, generator=generator),
        before.lora_B + _NOISE * torch.randn(before.lora_B.shape, generator=generator),
    )
