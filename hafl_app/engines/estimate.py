"""What a run will take on this machine: clients at once, memory, and minutes by a few steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from hafl_app.cgroups import usable_cpus, usable_memory
from hafl_app.config.schema import Settings
from hafl_app.data.federated import FederatedText
from hafl_app.engines.flower_run import resources_for
from hafl_app.engines.one_run import count_trainers
from hafl_app.lowrank.factors import Adapter, initial_adapter
from hafl_app.process_identity import seconds_of_process
from hafl_app.run import build
from hafl_app.run.device_gains import lone_clients
from hafl_app.run.workload import TRAINED, CentralRows, Step, steps_of
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.training.device import resolve_device, threads, usable_memory_mb
from hafl_app.training.evaluate import evaluate
from hafl_app.training.local import train
from hafl_app.training.lora_model import LoraModel, adapter_shapes
from hafl_app.wire.node_profile import NodeProfile

STARTS: Final = {"ray": 3.0, "inprocess": 1.2}
"""What a run takes before its first round, in times of what this process took to come so far.

Both import the same and load the same data; under Ray server and clients do so again.
"""

ERROR: Final = 2.0
"""Times as long, or as short, as a run may well be; see docs/running.md for what was measured."""

_STEPS = 4  # that are timed, after as many that warm up
_MOST_ROWS = 256  # that are scored to time it
_FLOWER_MB = 900.0  # of SuperLink, Ray and the server beside the clients


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Parameters
    ----------
    at_once
        Clients that train at the same time.
    needed_mb, usable_mb
        Memory of all of them, about, and that of the device, in MB of 10^6 bytes.
    seconds
        By stage, and of the ``start``.
    clients
        Of the run.
    lone
        Clients that train alone besides.
    """

    at_once: int
    needed_mb: float
    usable_mb: float
    seconds: dict[str, float]
    clients: int
    lone: int

    @property
    def total_s(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Costs:
    """Seconds of one text on this machine: in training, as it counts in steps, and scored."""

    trained: float
    scored: float


def estimate(settings: Settings) -> Estimate:
    """Measure a few steps of one client, and multiply them by the work of the run.

    Parameters
    ----------
    settings
        Checked, see `hafl_app.run.preflight.check`.
    """
    start = STARTS[settings.engine] * seconds_of_process()
    number = settings.federation.num_clients
    text = build.federated_text(settings, number)
    profiles = _profiles(settings, text)
    strategy = build.strategy(settings)
    model = build.model(settings, len(text.label_names))
    with threads(settings.client.num_threads):
        costs = measure(settings, strategy, model, text, profiles)
    scored = settings.federation.central_evaluation and settings.model.head != "local"
    rows = CentralRows(len(text.validation), len(text.test)) if scored else CentralRows(0, 0)
    held_out = build.unseen_partitions(settings)
    steps = steps_of(settings, strategy.options, profiles, held_out, rows)
    at_once = clients_at_once(settings)
    lone = [p for p in profiles if p.partition_id not in held_out]
    return Estimate(
        at_once,
        _memory(settings, text, profiles, at_once),
        _usable_mb(settings),
        {"start": start, **seconds_of(steps, costs, at_once)},
        number,
        len(lone_clients(settings, lone)) if rows.test else 0,
    )


def clients_at_once(settings: Settings) -> int:
    """Return how many clients of a run train at the same time on this machine."""
    federation = settings.federation
    if settings.engine == "inprocess":
        return 1
    if count_trainers(settings):
        return federation.cohort_clients or 1
    gpus = 0 if settings.client.device == "cpu" else torch.cuda.device_count()
    found = resources_for(
        federation.num_clients,
        settings.client.num_threads,
        gpus,
        federation.client_cpus,
        federation.client_gpus,
    )
    at_once = max(1, usable_cpus() // found.client_cpus)
    if found.client_gpus:
        at_once = min(at_once, max(1, int(gpus / found.client_gpus)))
    return min(at_once, federation.num_clients)


def seconds_of(steps: Sequence[Step], costs: Costs, at_once: int) -> dict[str, float]:
    """Return the seconds of every stage of a run.

    Parameters
    ----------
    at_once
        Clients that train at the same time; none of them is faster for it, nor slower.
    """
    found: dict[str, float] = {}
    for step in steps:
        cost = costs.trained if step.stage in ("train", "alone") else costs.scored
        shared = step.texts / at_once if step.longest else step.texts
        found[step.stage] = found.get(step.stage, 0.0) + cost * max(shared, step.longest)
    return found


def measure(
    settings: Settings,
    strategy: HeterogeneousLora,
    model: LoraModel,
    text: FederatedText,
    profiles: Sequence[NodeProfile],
) -> Costs:
    """Time a few steps of the client with the most rows, and a scoring of those that it has."""
    profile = max(profiles, key=lambda p: (p.num_examples, -p.partition_id))
    spec = build.model_spec(settings, len(text.label_names))
    strategy.global_adapter = initial_adapter(
        adapter_shapes(spec), strategy.max_rank, settings.seed
    ).with_head(spec.initial_head())
    plan = replace(strategy.plan(profile, 1), local_epochs=1, probe_batches=0, max_steps=_STEPS)
    adapter: Adapter = strategy.dispatch(plan)
    examples, options = text.train(profile.partition_id), build.train_options(settings)

    def few_steps() -> float:
        started = time.perf_counter()
        result = train(model, adapter, plan, examples, options, settings.seed)
        trained = sum(result.passes[-1].rows.values())
        return (time.perf_counter() - started) / (TRAINED * trained)

    few_steps()
    trained = few_steps()
    rows = examples.select(range(min(len(examples), _MOST_ROWS)))
    evaluate(model, rows, settings.client.precision)
    started = time.perf_counter()
    evaluate(model, rows, settings.client.precision)
    return Costs(trained, (time.perf_counter() - started) / len(rows))


def _profiles(settings: Settings, text: FederatedText) -> list[NodeProfile]:
    """Return what the nodes of a simulation would state."""
    tiers = build.client_tiers(settings, settings.federation.num_clients)
    return [
        NodeProfile(
            number,
            len(tiers),
            tier.rank,
            size,
            "cpu",
            node_id=number + 1,
            rank_pattern=dict(tier.rank_pattern),
        )
        for number, (tier, size) in enumerate(zip(tiers, text.sizes(), strict=True))
    ]


def _memory(
    settings: Settings, text: FederatedText, profiles: Sequence[NodeProfile], at_once: int
) -> float:
    """Return about how much memory training takes, in MB."""
    found = build.step_memory(settings, len(text.label_names))
    ranks = sorted((min(max(p.ranks), found.max_rank) for p in profiles), reverse=True)
    needed = sum(found.needed_mb(rank) for rank in ranks[:at_once])
    return needed + (_FLOWER_MB if settings.engine == "ray" else 0.0)


def _usable_mb(settings: Settings) -> float:
    device = resolve_device(settings.client.device)
    return usable_memory_mb(device) if device.type == "cuda" else usable_memory()[1] / 1e6


def advice(settings: Settings, found: Estimate) -> list[str]:
    """Return what could be changed, most useful first; empty if all is well."""
    lines = []
    if found.needed_mb > found.usable_mb:
        if found.at_once > 1:
            fewer = f"federation.client_cpus={usable_cpus()}, or engine=inprocess"
            lines.append(f"memory may not suffice: {fewer} trains one client at a time")
        smaller = max(1, (settings.client.micro_batch_size or settings.client.batch_size) // 2)
        lines.append(
            f"less memory a client: client.micro_batch_size={smaller}, "
            "client.gradient_checkpointing=true"
        )
    total = found.total_s
    if (alone := found.seconds.get("alone", 0.0)) > 0.1 * total:
        lines.append(
            f"{found.lone} clients that train alone are {alone / total:.0%} of the time: "
            "federation.alone_clients_per_rank=0 leaves them out"
        )
    if (scored := found.seconds.get("score", 0.0)) > 0.3 * total:
        rarer = "federation.test_every=0" if settings.federation.test_every else ""
        rarer = rarer or f"federation.evaluate_every={2 * settings.federation.evaluate_every}"
        lines.append(f"scoring on the server is {scored / total:.0%} of the time: {rarer}")
    if settings.engine == "ray" and found.seconds["start"] > 0.3 * total:
        lines.append("most of a short run is Ray's start: engine=inprocess")
    return lines
