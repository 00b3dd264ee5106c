"""Run a federation from settings to results: wait for nodes, run the rounds, write the results."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.serverapp import Grid

from hafl_app.config.schema import Settings
from hafl_app.data.shares import CentralText
from hafl_app.lowrank.factors import Adapter, initial_adapter
from hafl_app.run import build
from hafl_app.run.checks import check_settings
from hafl_app.run.cpu_seconds import CpuSeconds
from hafl_app.run.data_report import report_data
from hafl_app.run.device_gains import lone_clients
from hafl_app.run.evaluation import CentralEvaluation
from hafl_app.run.logs import show_log
from hafl_app.run.origin import origin
from hafl_app.run.reporting import RunReport
from hafl_app.run.requirements import check_packages
from hafl_app.run.resuming import (
    RunCheckpoints,
    agreed_before,
    check_resumable,
    cohort_facts,
    load_checkpoint,
    resume,
)
from hafl_app.run.run_folder import output_folder
from hafl_app.run.run_lock import run_lock
from hafl_app.run.setup import known_label_names, wait_for_nodes, warn_of_weights
from hafl_app.run.simulated_time import check_memory, check_nodes
from hafl_app.server.checkpoint_store import Checkpoint
from hafl_app.server.client_answers import answers_of_clients
from hafl_app.server.held_out_clients import evaluate_unseen
from hafl_app.server.local_baseline import AloneResult, train_alone
from hafl_app.server.numbering import Numbering
from hafl_app.server.rounds import run_rounds, solve_head, solve_heads_of_ranks
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.tracking.base import INTERRUPTED
from hafl_app.training.lora_model import adapter_shapes


def run(
    grid: Grid,
    settings: Settings,
    *,
    overrides: Sequence[str] = (),
    on_round: Callable[[int, Adapter], None] | None = None,
) -> None:
    """Run a federation over the grid's nodes and write its results.

    Parameters
    ----------
    overrides
        From which the settings were composed; a checkpoint keeps them.
    on_round
        Called with the round and the global adapter, before the first round (0) and after each.

    Raises
    ------
    hafl_app.config.compose.SettingsError
        If the settings do not go together; nothing is written then.
    hafl_app.server.method.StrategyError
        If the method cannot serve these nodes.
    hafl_app.server.rounds.RoundFailedError
        If a round failed, however often it was repeated.
    hafl_app.run.resumable_run.ResumeError
        If the run cannot be resumed, or not with these settings.
    hafl_app.run.run_folder.RunFolderError
        If the folder holds a run that would be lost; it stays as it is.
    ValueError
        If the settings need a package that is not installed, see `hafl_app.run.requirements`.
    hafl_app.run.run_lock.RunLockedError
        If another process is still writing the folder.
    """
    check_settings(settings)
    check_packages(settings, nodes_too=False)
    check_nodes(grid, settings)
    show_log()
    # Flower logs a dozen lines a round; the trackers report rounds here.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    folder = output_folder(settings)
    if not origin().closes:  # else the command that shows the run names it
        print(f"Output folder: {folder}", flush=True)  # noqa: T201  the log must name it
    warn_of_weights(settings.model)
    with run_lock(folder):
        _run(grid, settings, folder, overrides, on_round)


def _run(
    grid: Grid,
    settings: Settings,
    folder: Path,
    overrides: Sequence[str],
    on_round: Callable[[int, Adapter], None] | None,
) -> None:
    strategy = build.strategy(settings)
    report = RunReport(settings, strategy, folder)
    checkpoints = RunCheckpoints(folder, settings, tuple(overrides))
    cpu_seconds = CpuSeconds(grid)

    def after_round(server_round: int) -> bool:
        with cpu_seconds.apart():
            report.evaluate(server_round)
            if on_round is not None:
                on_round(server_round, strategy.global_adapter)
            checkpoints.save(strategy, report, grid, server_round)
        return bool(report.stop_reason)

    try:
        checkpoint = load_checkpoint(folder) if settings.resume else None
        if checkpoint is not None:
            check_resumable(checkpoint, settings)
            checkpoints.check_base_model(checkpoint)
        initial, text = _prepare(grid, settings, strategy, report, checkpoint)
        profiles = strategy.coordinator.directory.in_order()
        # Up to here nothing has been written: a run that is refused leaves its folder as it was.
        if checkpoint is None:
            checkpoints.forget()
            report_data(settings, text, profiles, folder)
            with cpu_seconds.rounds():
                solve_head(strategy, grid, 0)
            after_round(0)
        else:
            resume(checkpoint, settings, strategy, report, grid)
            report_data(settings, text, profiles, folder)
        first_round = checkpoint.server_round + 1 if checkpoint else 1
        if not report.stop_reason:
            with cpu_seconds.rounds():
                run_rounds(strategy, grid, first_round, after_round)
        if report.stop_reason:
            solve_heads_of_ranks(strategy, grid, report.rounds[-1].server_round)
        unseen = evaluate_unseen(strategy, grid, report.rounds[-1].server_round)
        answered = answers_of_clients(strategy, grid, report.rounds[-1].server_round)
        alone = _alone(grid, settings, strategy, initial, report) if report.has_test else []
        times = None if checkpoint else cpu_seconds.to_json()  # of all rounds, or not at all
        facts = {"cohort": cohort_facts(grid), "cpu_seconds": times, "client_generation": answered}
        report.finish(alone, unseen, **facts)
    except (KeyboardInterrupt, SystemExit):  # Flower's processes end themselves by the latter
        report.fail("interrupted", INTERRUPTED)
        raise
    except BaseException as error:
        report.fail(f"{type(error).__name__}: {error}")
        raise


def _prepare(
    grid: Grid,
    settings: Settings,
    strategy: HeterogeneousLora,
    report: RunReport,
    checkpoint: Checkpoint | None,
) -> tuple[Adapter, CentralText]:
    """Wait for the nodes, agree on the classes; return the adapter of round 0 and the data.

    The base model's weights are loaded when the first adapter is scored, if any is.
    """
    label_names, numbering = known_label_names(settings), Numbering()
    if checkpoint is not None:
        label_names, numbering = agreed_before(checkpoint, label_names)
    text = wait_for_nodes(grid, settings, strategy, label_names, numbering)
    profiles = strategy.coordinator.directory.in_order()
    check_memory(settings, profiles, len(text.label_names))
    spec = build.model_spec(settings, len(text.label_names))
    head = spec.initial_head()
    initial = initial_adapter(adapter_shapes(spec), strategy.max_rank, settings.seed).with_head(
        {} if settings.model.head == "local" else head
    )
    evaluation = CentralEvaluation(settings, text, head)
    _ = evaluation.watched  # a prompt that has no room is refused before anything is written
    report.evaluate_with(evaluation)
    strategy.coordinator.closed_form.validation = evaluation.validation_features
    strategy.coordinator.prepare(initial, report.on_reply)
    return initial, text


def _alone(
    grid: Grid,
    settings: Settings,
    strategy: HeterogeneousLora,
    initial: Adapter,
    report: RunReport,
) -> list[AloneResult]:
    """Train some clients without the federation, for comparison."""
    lone = lone_clients(settings, strategy.coordinator.participation.trainable())
    rounds = report.rounds[-1].server_round
    alone = train_alone(strategy, grid, initial, lone, rounds) if lone else []
    if lone and settings.federation.alone_at_max_rank:
        alone += train_alone(strategy, grid, initial, lone, rounds, strategy.max_rank)
    return alone
