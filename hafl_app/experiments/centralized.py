"""Centralized LoRA: all clients' training data in one place, the upper reference."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from omegaconf import OmegaConf

from hafl_app.config.schema import Settings
from hafl_app.data.conversations import prompt_facts
from hafl_app.data.federated import FederatedText
from hafl_app.data.images import EncodedImages
from hafl_app.data.text import EncodedText
from hafl_app.lowrank.factors import Adapter, initial_adapter
from hafl_app.metrics import Choice, Metric, Task
from hafl_app.plan import TrainPlan
from hafl_app.run import build
from hafl_app.run.device_gains import device_gains
from hafl_app.run.logs import show_log
from hafl_app.run.plain_settings import plain_settings
from hafl_app.run.setup import warn_of_weights
from hafl_app.run.summary import model_facts
from hafl_app.server.client_sampling import sample_size
from hafl_app.tracking.base import RoundRecord
from hafl_app.tracking.jsonl import JsonlTracker
from hafl_app.training.adapter_files import save_adapter
from hafl_app.training.batches import Examples
from hafl_app.training.device import threads
from hafl_app.training.evaluate import evaluate
from hafl_app.training.local import train
from hafl_app.training.locate import weights_note
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.task import TrainResult
from hafl_app.wire.node_profile import NodeProfile

KIND: Final = "centralized"
"""What the summary of such a run says that it is."""

_WIDTH = 6  # of a column of scores, unless its title is longer


def num_passes(settings: Settings) -> int:
    """Count the federation's passes over its data, at least one.

    ``num_rounds * local_epochs * fraction_train``, rounded.
    """
    federation = settings.federation
    passes = federation.num_rounds * settings.client.local_epochs * federation.fraction_train
    return max(1, round(passes))


def union(parts: Sequence[EncodedText]) -> EncodedText:
    """Return all rows of all parts, in their order."""
    images = [part for part in parts if isinstance(part, EncodedImages)]
    if images:
        pixels = np.concatenate([part.pixels for part in images])
        return EncodedImages.of(pixels, np.concatenate([part.labels for part in images]))
    starts = np.cumsum([0, *(len(part.tokens) for part in parts[:-1])])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=True)]
    end = sum(len(part.tokens) for part in parts)
    masks = [part.loss_mask for part in parts if part.loss_mask is not None]
    cuts = [part.is_cut for part in parts if part.is_cut is not None]
    return EncodedText(
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=np.concatenate([*offsets, [end]]),
        labels=np.concatenate([part.labels for part in parts]),
        loss_mask=np.concatenate(masks) if masks else None,
        is_cut=np.concatenate(cuts) if cuts else None,
    )


def train_centralized(
    settings: Settings, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train at ``lora.max_rank`` on the union of the clients' training data.

    Same base model, initial adapter and head, optimizer, batch size and learning rate as the
    federation, and as many passes over the data; so as many steps as all its clients together.
    ``federation.score_device_ranks`` scores the last adapter cut to the clients' ranks as well.
    The optimizer keeps its state from pass to pass, which a federation's clients do not.

    Returns
    -------
    dict
        The summary, as written to ``summary.json`` beside ``metrics.jsonl``, ``config.yaml`` and
        the adapter of the last pass.
    """
    show_log()
    warn_of_weights(settings.model)
    text = build.federated_text(settings, settings.federation.num_clients)
    model = build.model(settings, len(text.label_names))
    examples = union([text.train(i) for i in range(text.num_partitions)])
    adapter, plan = _start(settings, model)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(plain_settings(settings)), folder / "config.yaml")
    task = build.task(settings)
    say(header(task))
    passes = _Passes(settings, model, text, JsonlTracker(folder), say)
    model.load_whole(adapter)
    passes.score(0, math.nan)  # as a federation's round 0
    with threads(settings.client.num_threads):
        options = build.train_options(settings)
        result = train(model, adapter, plan, examples, options, settings.seed, passes.score)
    labels = Counter(text.validation.labels.tolist())
    choice = Choice.by_validation(task, labels.values(), len(text.label_names) or 1)
    summary = _summary(settings, plan, result, passes, choice)
    passes.tracker.finish(summary)
    save_adapter(
        folder / "adapter",
        result.adapter,
        build.model_spec(settings, len(text.label_names)),
        label_names=text.label_names,
        max_length=settings.dataset.max_length,
        facts={
            "centralized": True,
            "seed": settings.seed,
            "metrics": summary["final"],
            **prompt_facts(settings.dataset),
            "base_weights": weights_note(settings.model),
        },
    )
    return summary


class _Passes:
    """Scores after every pass, and the CPU seconds of what is trained between them."""

    def __init__(
        self,
        settings: Settings,
        model: LoraModel,
        text: FederatedText,
        tracker: JsonlTracker,
        say: Callable[[str], None],
    ) -> None:
        self._settings, self._model, self._text, self._say = settings, model, text, say
        self._task = build.task(settings)
        self.tracker = tracker
        self.tracker.start(plain_settings(settings), [])
        self.records: list[RoundRecord] = []
        self.cpu_seconds = 0.0
        self._began, self._began_cpu = time.perf_counter(), time.process_time()

    @property
    def num_validation(self) -> int:
        """Rows of validation data."""
        return len(self._text.validation.labels)

    def score(self, number: int, loss: float) -> None:
        """Record a pass; 0 is what there is before any."""
        if number:
            self.cpu_seconds += time.process_time() - self._began_cpu
        metrics = self._scores("test", self._text.test)
        if self.num_validation:
            metrics |= self._scores("validation", self._text.validation)
        seconds = time.perf_counter() - self._began
        record = RoundRecord(number, seconds, loss, 0, 0, 0, 0, metrics)
        self.tracker.log_round(record)
        if number:
            self.records.append(record)
        self._say(_line(record, self._task))
        self._began, self._began_cpu = time.perf_counter(), time.process_time()

    def slices(self, adapter: Adapter) -> list[dict[str, Any]]:
        """Return the test scores of an adapter cut to the ranks of the clients, if asked for."""
        if not self._settings.federation.score_device_ranks:
            return []
        metric = self._task.primary
        whole = self.records[-1].metrics[metric.key("test")]

        def score_of(cut: Adapter) -> float:
            self._model.load_whole(cut)
            return self._scores("test", self._text.test)[metric.key("test")]

        return device_gains(adapter, whole, [], score_of, metric, _profiles(self._settings))

    def _scores(self, phase: str, rows: Examples) -> dict[str, float]:
        return evaluate(self._model, rows, self._settings.client.precision).named(phase)


def _profiles(settings: Settings) -> list[NodeProfile]:
    tiers = build.client_tiers(settings, settings.federation.num_clients)
    return [
        NodeProfile(i, len(tiers), tier.rank, 1, "cpu", rank_pattern=tier.rank_pattern)
        for i, tier in enumerate(tiers)
    ]


def _start(settings: Settings, model: LoraModel) -> tuple[Adapter, TrainPlan]:
    """Return the federation's initial adapter, and the plan to train all of it."""
    strategy = build.strategy(settings)
    strategy.global_adapter = initial_adapter(model.shapes(), strategy.max_rank, settings.seed)
    federation = settings.federation
    # A limit of steps holds for each client of each round.
    clients = sample_size(federation.fraction_train, federation.num_clients)
    plan = strategy.prefix_plan(
        strategy.max_rank,
        head="frozen" if settings.model.head == "frozen" else "averaged",
        local_epochs=num_passes(settings),
        max_steps=federation.num_rounds * clients * settings.client.max_steps,
        rates=strategy.options.rates_until(federation.num_rounds),
        proximal=0.0,
        logit_adjustment=None,
    )
    return strategy.global_adapter.with_head(model.initial_head), plan


def _summary(
    settings: Settings,
    plan: TrainPlan,
    result: TrainResult,
    passes: _Passes,
    choice: Choice,
) -> dict[str, Any]:
    records = passes.records
    chosen = max(records, key=lambda record: choice.merit(record.metrics))
    return {
        "status": "finished",
        "kind": KIND,
        "model": model_facts(settings.model),
        "rank": settings.lora.max_rank,
        "learning_rate": settings.client.learning_rate,
        "seed": settings.seed,
        "passes": plan.local_epochs,
        "steps": result.steps,
        "num_examples": result.num_examples,
        "final": dict(records[-1].metrics),
        "best_validation": {
            "pass": chosen.server_round,
            "chosen_by": choice.metric.name,
            "rows": passes.num_validation,
            **chosen.metrics,
        },
        "each_pass": [
            {"pass": r.server_round, "loss": r.train_loss, "seconds": r.seconds, **r.metrics}
            for r in records
        ],
        "device_ranks": passes.slices(result.adapter),
        "train_options": asdict(build.train_options(settings)),
        "seconds": result.seconds,
        "cpu_seconds": {"clients": passes.cpu_seconds},
    }


def header(task: Task) -> str:
    """Return the heading of the table of passes."""
    cells = "   ".join(f"{title:>{_WIDTH}}" for title, _, _ in _columns(task))
    return f"pass   train loss   {cells}   seconds"


def _columns(task: Task) -> list[tuple[str, Metric, str]]:
    """Return title, metric and phase of the scores in the table."""
    return [
        ("validation", task.primary, "validation"),
        ("test", task.primary, "test"),
        (f"test {task.second.title}", task.second, "test"),
    ]


def _line(record: RoundRecord, task: Task) -> str:
    cells = [
        f"{metric.text(record.metrics.get(metric.key(phase))):>{max(_WIDTH, len(title))}}"
        for title, metric, phase in _columns(task)
    ]
    scores = "   ".join(cells)
    return (
        f"{record.server_round:>4}   {record.train_loss:>10.4f}   {scores}   {record.seconds:>7.1f}"
    )
