"""Report of a run: the trackers' records, the best round, and the output files."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import MetricRecord
from omegaconf import OmegaConf
from torch import Tensor

from hafl_app.config.schema import Settings
from hafl_app.lowrank.factors import Adapter
from hafl_app.metrics import TASKS, Choice
from hafl_app.publishing.card import add_card
from hafl_app.run.best_round import BestRound, is_best
from hafl_app.run.client_records import (
    client_record,
    client_rows,
    influence_entries,
    score_records,
    spread_of_clients,
)
from hafl_app.run.clients_file import ClientsFile
from hafl_app.run.device_gains import device_gains
from hafl_app.run.early_stopping import stop_reason
from hafl_app.run.evaluation import CentralEvaluation
from hafl_app.run.origin import origin
from hafl_app.run.plain_settings import plain_settings
from hafl_app.run.progress import Progress
from hafl_app.run.saved_adapters import save_of_round
from hafl_app.run.simulated_time import time_facts
from hafl_app.run.summary import (
    bytes_by_phase,
    device_facts,
    run_facts,
    versions,
)
from hafl_app.run.workload import CentralRows, client_texts, steps_of
from hafl_app.server.influence import deciding
from hafl_app.server.local_baseline import AloneResult
from hafl_app.server.round_messages import Reply
from hafl_app.server.snapshot import adapter_of, adapter_tree
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.tracking.answers_page import AnswersPage
from hafl_app.tracking.base import (
    FAILED,
    NO_HISTORY,
    RoundRecord,
    Tracker,
    Trackers,
)
from hafl_app.tracking.console import ConsoleTracker
from hafl_app.tracking.details import (
    ANSWERS,
    DetailsFile,
    answers_record,
    importance_record,
)
from hafl_app.tracking.external import TrackedRun, external_trackers
from hafl_app.tracking.jsonl import SUMMARY_FILE, JsonlTracker, read_history, replace_file
from hafl_app.wire.node_profile import NodeProfile

_LOGGER = logging.getLogger(__name__)


class RunReport:
    """Records of a run: evaluates the global adapter after rounds and writes the results.

    A round is scored on validation data where `RunOptions.is_evaluated` says so, and on test data
    every ``federation.test_every`` rounds; the last round is scored on both. The best round's test
    scores come at the end: `finish` adds them to its record, and they stand in the summary.

    Parameters
    ----------
    settings
        Of the run.
    strategy
        The method, whose global adapter is evaluated.
    folder
        Of the run's output.

    Attributes
    ----------
    progress
        Where the run stands; follows its exchanges.
    rounds
        Records of the rounds so far.
    """

    def __init__(
        self,
        settings: Settings,
        strategy: HeterogeneousLora,
        folder: Path,
    ) -> None:
        self._settings = settings
        self._task = TASKS[settings.model.task]
        self._metric = self._task.primary
        self._strategy, self._coordinator = strategy, strategy.coordinator
        self._folder, self._clients_file = folder, ClientsFile(folder)
        self._details = DetailsFile(folder)
        self._answers = AnswersPage(folder)
        self._run_id = uuid4().hex
        self._history = NO_HISTORY
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self._origin = origin()
        self.progress = Progress(folder, None if self._origin.watched else _say)
        self._coordinator.watch = self.progress
        self._outcomes: list[Reply] = []
        self.rounds: list[RoundRecord] = []
        self._best: BestRound | None = None
        self._has_warned = False  # of few clients that decide
        self._client_scores_before: Mapping[str, Any] = {}  # of the checkpoint

    @cached_property
    def _trackers(self) -> Trackers:
        # Made at the first record, since a resumed run keeps its id.
        console = ConsoleTracker(
            None,
            self._settings.federation.num_rounds,
            seconds_left=self.progress.seconds_left,
            folder=self._folder,
            closes=not self._origin.closes,
        )
        return _trackers(self._settings, self._folder, self._run_id, console)

    def evaluate_with(self, evaluation: CentralEvaluation) -> None:
        """Set the central evaluation before round 0, once the classes are known."""
        self._evaluation = evaluation

    @property
    def has_test(self) -> bool:
        """Whether the server evaluates adapters on test data."""
        return self._evaluation.has_test

    @cached_property
    def _choice(self) -> Choice | None:
        """By what the best round is chosen; None if there is nothing."""
        if self._evaluation.chooses_best:
            return self._evaluation.choice
        # Scores of clients carry no noise, so that a choice by them would cost privacy.
        none_private = self._strategy.options.privacy.kind == "none"
        return Choice.by_clients(self._task) if none_private else None

    @property
    def stop_reason(self) -> str:
        """Why the last round is not followed by those that are left; empty if it is."""
        if not self.rounds or self.rounds[-1].server_round >= self._strategy.options.last_round:
            return ""
        settings = self._settings.federation.early_stopping
        return stop_reason(self.rounds, self._choice, settings)

    def clients(self, profiles: Sequence[NodeProfile]) -> None:
        """Start the trackers with the clients of the run, and write the resolved settings."""
        rows = client_rows(profiles, self._strategy)
        self._trackers.start(plain_settings(self._settings), rows, self._history)
        self._details.start(self.rounds[-1].server_round if self.rounds else -1)
        self._answers.start(self._details.records(ANSWERS))
        self._write_settings()
        self._plan_progress(profiles)

    def _plan_progress(self, profiles: Sequence[NodeProfile]) -> None:
        text, scored = self._evaluation.text, self._evaluation.of_rounds
        rows = CentralRows(len(text.validation), len(text.test)) if scored else CentralRows(0, 0)
        held_out = self._coordinator.participation.held_out
        options = self._strategy.options
        if self.stop_reason:
            federation = replace(options.federation, num_rounds=self.rounds[-1].server_round)
            options = replace(options, federation=federation)
        steps = steps_of(self._settings, options, profiles, held_out, rows)
        texts = {p.node_id: client_texts(self._settings, p.num_examples) for p in profiles}
        self.progress.plan(steps, texts)

    def _write_settings(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.create(plain_settings(self._settings)))
        replace_file(self._folder / "config.yaml", text)

    def state(self) -> dict[str, Any]:
        """Return the report's part of a checkpoint, as plain values."""
        return {
            "run_id": self._run_id,
            "seconds": time.perf_counter() - self._started,
            "best": self._best.state() if self._best else None,
            "client_scores": self._client_scores(),
        }

    def tensors(self) -> dict[str, Any]:
        """Return the adapter of the best round, as a tree of tensors."""
        return {"best": adapter_tree(self._best.adapter)} if self._best else {}

    def resume(self, last_round: int, state: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Resume an earlier run's report after its round ``last_round``.

        Raises
        ------
        OSError, ValueError
            If the records of its rounds cannot be read.
        """
        self._run_id = state["run_id"]
        self._seconds_before = state["seconds"]
        self._started -= state["seconds"]
        self._history = read_history(self._folder, last_round)
        self.rounds = list(self._history.rounds)
        if best := state["best"]:
            adapter = adapter_of(tensors["best"])
            self._best = BestRound(best["round"], best.get("rows", 0), adapter)
        self._client_scores_before = state.get("client_scores", {})
        self.clients(self._coordinator.directory.in_order())

    def on_reply(self, reply: Reply) -> None:
        """Record one client's reply to a training request."""
        self._outcomes.append(reply)
        self.progress.trained(reply.metrics.get("seconds", 0.0))
        # Under central privacy, who took part and with what result stays on this machine.
        hidden = self._strategy.options.privacy.kind == "central_dp"
        self._trackers.log_client(client_record(reply), external=not hidden)

    def evaluate(self, server_round: int) -> MetricRecord:
        """Evaluate the global adapter on the server's data, if it is due, and log the round."""
        if server_round == 0:
            self.clients(self._coordinator.directory.in_order())
        self._clients_file.update(self._coordinator.directory)
        self.progress.begin("score", server_round)
        metrics = self._scores(server_round)
        due = self._strategy.options.is_evaluated(server_round)
        answers = self._evaluation.answers(self._strategy.global_adapter) if due else []
        record = self._round_record(server_round, metrics)
        self._outcomes = []
        self.rounds.append(record)
        self.progress.end()
        if self.stop_reason:
            record = self._complete(record, self._strategy.global_adapter, "test")
            self._plan_progress(self._coordinator.directory.in_order())
        self.progress.was_printed()
        self._trackers.log_round(record)
        self._log_details(server_round)
        if answers:
            self._log_answers(answers_record(server_round, answers))
        if server_round and self._choice:
            self._keep_best(record, self._choice)
        return MetricRecord(dict(metrics))

    def _scores(self, server_round: int) -> dict[str, float]:
        """Return what is measured after a round: by clients, server and accountant."""
        metrics = {f"clients/{k}": v for k, v in self._coordinator.client_scores.items()}
        splits = self._splits(server_round)
        if self._evaluation.of_rounds:
            metrics |= self._evaluation.metrics(self._strategy.global_adapter, splits)
        privacy = self._strategy.options.privacy
        if privacy.kind != "none":
            from hafl_app.privacy.accounting import epsilon_after  # noqa: PLC0415  takes a second

            rate = self._settings.federation.fraction_train
            metrics["privacy/epsilon"] = epsilon_after(privacy, server_round, rate)
        return metrics | self._learning_rate(server_round)

    def _round_record(self, server_round: int, metrics: Mapping[str, float]) -> RoundRecord:
        traffic, clock = self._coordinator.ledger.of_round(server_round), self._coordinator.clock
        private = self._strategy.options.privacy.kind != "none"
        return RoundRecord(
            server_round=server_round,
            seconds=time.perf_counter() - (self._coordinator.round_started or self._started),
            # A mean of losses carries no noise.
            train_loss=math.nan if private else self._coordinator.train_loss,
            bytes_down=traffic.bytes_down,
            bytes_up=traffic.bytes_up,
            replies=sum(not outcome.error for outcome in self._outcomes),
            failures=sum(bool(outcome.error) for outcome in self._outcomes),
            metrics=metrics,
            influence=self._influence(server_round),
            simulated_seconds=clock.take_round() if clock else math.nan,
        )

    def _keep_best(self, record: RoundRecord, choice: Choice) -> None:
        """Keep the global adapter if this round is the best so far."""
        if not is_best(record, self._best, self.rounds, choice):
            return
        central = choice.phase == "validation"
        rows = len(self._evaluation.text.validation) if central else 0
        rows = rows or self._coordinator.scored_examples
        self._best = BestRound(record.server_round, rows, self._strategy.global_adapter)

    def _learning_rate(self, server_round: int) -> dict[str, float]:
        """Return the learning rate of a round, if it is not that of every other."""
        client = self._settings.client
        if not server_round or not client.schedule.changes:
            return {}
        rate = client.learning_rate * self._strategy.options.rate(server_round)
        return {"schedule/learning_rate": rate}

    def _log_details(self, server_round: int) -> None:
        """Record each client's scores, and the components' importance once there was training."""
        scored = self._coordinator.scored
        self._details.write(score_records(server_round, scored, self._task))
        if server_round:
            measure, modules = self._strategy.component_importance()
            values = {name: scores.tolist() for name, scores in modules.items()}
            self._details.write([importance_record(server_round, measure, values)])

    def _log_answers(self, record: Mapping[str, Any]) -> None:
        """Keep what was answered after a round, for a machine and for a reader."""
        self._details.write([record])
        self._answers.add(record)

    def _influence(self, server_round: int) -> list[dict[str, float]]:
        """Return the influence of each client in a round; warn once if few of them decide."""
        found = self._coordinator.influences if server_round else ()
        if (few := deciding(found)) and not self._has_warned:
            self._has_warned = True
            _LOGGER.warning("round %d: %s, see docs/methods.md#influence", server_round, few)
        return influence_entries(found, self._coordinator.directory.in_order())

    def _splits(self, server_round: int) -> list[str]:
        """Return the server's data that the adapter after this round is scored on."""
        options = self._strategy.options
        every, last = options.federation.test_every, server_round == options.last_round
        splits = ["test"] if last or (every and server_round % every == 0) else []
        return [*splits, "validation"] if options.is_evaluated(server_round) else splits

    def finish(
        self,
        alone: Sequence[AloneResult],
        unseen: Mapping[str, Any] | None = None,
        **facts: Mapping[str, Any] | None,
    ) -> None:
        """Write adapters, curves and the summary.

        Parameters
        ----------
        alone
            Results of clients that trained without the federation.
        unseen
            Scores of clients that never trained, see `hafl_app.server.held_out_clients`.
        facts
            By key of the summary: ``cohort``, how many clients trained together, and why;
            ``cpu_seconds`` of the rounds; ``client_generation``, scores of answers that clients
            wrote. None where an engine does not know.
        """
        last = self._strategy.global_adapter
        self.progress.begin("finish", self.rounds[-1].server_round + 1)
        self._complete(self.rounds[-1], last, "test", "validation")
        categories = self._evaluation.categories(last)
        if self._best is not None:
            self._complete(self._best.record(self.rounds), self._best.adapter, "test")
        head = last.head or self._evaluation.initial_head
        heads = self._coordinator.closed_form.by_rank
        self._save("adapter", last.with_head(head), self.rounds[-1], heads)
        if self._best is not None:
            adapter = self._best.adapter
            record = self._best.record(self.rounds)
            self._save("adapter-best", adapter.with_head(adapter.head or head), record)
        # Only now, because matplotlib takes its time to import.
        from hafl_app.reports.figures.curves import draw_curves  # noqa: PLC0415

        draw_curves(self.rounds, self._folder / "curves.png", _title(self._settings))
        profiles = self._coordinator.directory.in_order()
        apart = {
            "categories": categories,
            "client_scores": self._client_scores(),
            "clients": self._clients(unseen),
            "generation": self._evaluation.generation(last),
            "watched": self._answers.facts(),
            "simulated_time": time_facts(self._settings, self.rounds, profiles),
            **facts,
        }
        summary = self._summary(alone) | {k: v for k, v in apart.items() if v}
        self.progress.close()
        summary |= {
            "stages": dict(self.progress.seconds),
            "seconds": time.perf_counter() - self._started,
            "seconds_before": self._seconds_before,
        }
        self._trackers.finish(summary)
        folders = [self._folder / name for name in ("adapter", "adapter-best")]
        if saved := [folder for folder in folders if folder.is_dir()]:
            add_card(*saved)  # reads the summary

    def _complete(self, record: RoundRecord, adapter: Adapter, *splits: str) -> RoundRecord:
        """Add the scores on these data that a round's record lacks; return it with them."""
        missing = [s for s in splits if self._metric.key(s) not in record.metrics]
        if not (self._evaluation.of_rounds and missing):
            return record
        scores = self._evaluation.metrics(adapter, missing)
        completed = replace(record, metrics={**record.metrics, **scores})
        self.rounds[self.rounds.index(record)] = completed
        return completed

    def _clients(self, unseen: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the last scores of trained and of unseen clients; empty without unseen ones."""
        seen = dict(self._coordinator.client_scores)
        return {"seen": seen, "unseen": dict(unseen)} if unseen else {}

    def _client_scores(self) -> dict[str, Any]:
        """Return mean, worst tenth, worst and best of the clients' last scores, by metric.

        Those of the checkpoint where no client has sent scores since.
        """
        found = spread_of_clients(self._coordinator.scored, self._task)
        return found or dict(self._client_scores_before)

    def fail(self, reason: str, status: str = FAILED) -> None:
        """Report to the trackers that the run did not finish, with the reason.

        A summary in the folder is an earlier run's, which this one has not replaced: it stays. An
        error of the disk is logged, so that the one behind the failure is raised.
        """
        self.progress.close()
        if (self._folder / SUMMARY_FILE).exists():
            return
        try:
            self._trackers.fail(reason, status)
            if not (self._folder / "config.yaml").exists():
                self._write_settings()
        except OSError as error:
            _LOGGER.warning("the end of the run could not be written: %s", error)

    def _save(
        self,
        name: str,
        adapter: Adapter,
        record: RoundRecord,
        heads: Mapping[int, Mapping[str, Tensor]] | None = None,
    ) -> None:
        names = self._evaluation.text.label_names
        save_of_round(self._folder / name, adapter, record, self._settings, names, heads)

    def _scored_devices(self) -> Sequence[NodeProfile]:
        """Return the nodes whose slices of the last adapter are scored, alone trained or not."""
        wanted = self._settings.federation.score_device_ranks
        has_scores = self._evaluation.of_rounds and self.has_test
        return self._coordinator.directory.in_order() if wanted and has_scores else ()

    def _stopped_early(self) -> dict[str, Any]:
        """Return after which round the run ended, of how many, and why; empty if after all."""
        if not (reason := self.stop_reason):
            return {}
        ended, planned = self.rounds[-1].server_round, self._strategy.options.last_round
        return {"stopped_early": {"round": ended, "of": planned, "reason": reason}}

    def _heads(self) -> dict[str, Any]:
        """Return how heads in closed form were solved, if any were."""
        heads = self._coordinator.closed_form.to_json()
        return {"heads": heads} if heads else {}

    def _summary(self, alone: Sequence[AloneResult]) -> dict[str, Any]:
        ledger, profiles = self._coordinator.ledger, self._coordinator.directory.in_order()
        examples = sum(profile.num_examples for profile in profiles)
        classes, choice = len(self._evaluation.text.label_names), self._choice
        return {
            "status": "finished",
            **run_facts(self._settings, self._origin, examples, classes),
            "rounds": self.rounds[-1].server_round,
            **self._stopped_early(),
            "final": dict(self.rounds[-1].metrics),
            **(self._best.entry(self.rounds, choice) if self._best and choice else {}),
            "device_ranks": device_gains(
                self._strategy.global_adapter,
                self.rounds[-1].metrics.get(self._metric.key("test"), math.nan),
                alone,
                self._evaluation.primary_test_metric,
                self._metric,
                self._scored_devices(),
                self._coordinator.closed_form.of_ranks,
            ),
            "metric": self._metric.name,
            "bytes": bytes_by_phase(ledger),
            "nodes": [device_facts(p) for p in profiles],
            **self._heads(),
            "left_out": {
                str(node_id): why for node_id, why in self._coordinator.directory.refusals.items()
            },
            "versions": versions(),
        }


def _title(settings: Settings) -> str:
    return (
        f"{type(settings.strategy).__name__} on {settings.dataset.source}, "
        f"{settings.model.title}, {settings.partition.kind}, seed {settings.seed}"
    )


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _trackers(settings: Settings, folder: Path, run_id: str, console: ConsoleTracker) -> Trackers:
    required: list[Tracker] = [console, JsonlTracker(folder)]
    run = TrackedRun(folder, run_id, settings.name or folder.name, tuple(settings.tags))
    return Trackers(required, external_trackers(settings.tracking, run))
