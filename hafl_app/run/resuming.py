"""Resuming a run: its checkpoints, and the settings that may change.

A checkpoint has the strategy (global adapter, head, state of the method, ledger, quarantine), the
report (best round, tracker's run id, time spent) and the clients' states in the engine.
The scores of past rounds stay in ``metrics.jsonl``. Random numbers need no state: every draw is
seeded by the run's seed, the round and the partition.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp import Grid

from hafl_app.config.schema import Settings, resumable_settings
from hafl_app.renames import renamed_overrides, renamed_settings
from hafl_app.run import build
from hafl_app.run.plain_settings import plain_settings
from hafl_app.run.precisions import SETTING, changed_precision, precisions
from hafl_app.run.reporting import RunReport
from hafl_app.run.resumable_run import ResumeError, require_checkpoint
from hafl_app.server.checkpoint_store import Checkpoint, CheckpointStore
from hafl_app.server.coordinator import Strategy
from hafl_app.server.numbering import Numbering
from hafl_app.server.snapshot import Snapshot, flatten, restore, take_snapshot, unflatten
from hafl_app.training.base_files import BaseFiles
from hafl_app.training.cohort_choice import CohortChoice

_LOGGER = logging.getLogger(__name__)


class BaseModelChangedError(RuntimeError):
    """A base model whose files changed while the run was going on."""


@runtime_checkable
class KeepsClientState(Protocol):
    """An engine that can hand out and restore the states that clients keep between messages."""

    def client_states(self) -> dict[int, RecordDict]:
        """Return the state of every client by partition."""

    def set_client_states(self, states: Mapping[int, RecordDict]) -> None:
        """Restore the clients' states of an earlier run."""


@runtime_checkable
class TrainsCohorts(Protocol):
    """An engine that may train several clients together."""

    def cohort_choice(self) -> CohortChoice | None:
        """Return how many, once that is chosen."""

    def keep_cohort_choice(self, choice: CohortChoice) -> None:
        """Keep the choice of the run that goes on."""


def cohort_facts(grid: Grid) -> dict[str, Any] | None:
    """Return how many clients an engine trains together and why, as plain values."""
    choice = grid.cohort_choice() if isinstance(grid, TrainsCohorts) else None
    return asdict(choice) if choice else None


@dataclass(frozen=True)
class RunCheckpoints:
    """Checkpoints of one run.

    Parameters
    ----------
    folder
        Of the run; they go into ``checkpoints/`` there.
    settings, overrides
        Of the run: checked when it is resumed, and composed again.
    """

    folder: Path
    settings: Settings
    overrides: tuple[str, ...]

    @cached_property
    def _base_files(self) -> BaseFiles:
        return BaseFiles(build.base_spec(self.settings))

    @cached_property
    def _began_with(self) -> str:
        """The hash of the base model's files when the run began or was resumed."""
        return self._base_files.fingerprint()

    def check_base_model(self, checkpoint: Checkpoint) -> None:
        """Reject a base model whose files are not those of the run to resume.

        Raises
        ------
        ResumeError
            The adapter was trained on the former.
        """
        then, now = checkpoint.state.get("base_files"), self._began_with
        if then and now and then != now:
            raise ResumeError(
                f"model.path={self.settings.model.path}: its files are not those that the run to "
                "resume was trained on; put those back, or start a new run"
            )

    def save(self, strategy: Strategy, report: RunReport, grid: Grid, server_round: int) -> None:
        """Write a checkpoint if one is due: every so many rounds, and after the last.

        Raises
        ------
        OSError
            If it cannot be written; earlier checkpoints are unchanged.
        BaseModelChangedError
            If the files of the base model are no longer those that the run began with.
        """
        federation = self.settings.federation
        every = federation.checkpoint_every
        ends = server_round == strategy.options.last_round or bool(report.stop_reason)
        due = every and (server_round % every == 0 or ends)
        if not due:
            return
        began_with = self._began_with
        if self._base_files.fingerprint() != began_with:
            raise BaseModelChangedError(
                f"model.path={self.settings.model.path}: its files changed before the end of round "
                f"{server_round}, which is not kept; put those back that the run began with"
            )
        snapshot = take_snapshot(strategy)
        clients = grid.client_states() if isinstance(grid, KeepsClientState) else None
        state = {
            "settings": plain_settings(self.settings),
            "overrides": list(self.overrides),
            "strategy": snapshot.state,
            "report": report.state(),
            "noise_key": strategy.options.privacy.noise_key,
            "epsilon": report.rounds[-1].metrics.get("privacy/epsilon"),
            "client_states_kept": clients is not None,
            "cohort": cohort_facts(grid),
            "label_names": list(strategy.coordinator.directory.label_names or ()),
            "base_files": began_with,
            "precisions": precisions(self.settings, strategy.coordinator.directory.in_order()),
            "node_numbers": strategy.coordinator.directory.numbering.to_json(),
        }
        tree = {
            "strategy": snapshot.tree,
            "report": report.tensors(),
            "clients": _client_tree(clients or {}),
        }
        _store(self.folder).save(server_round, flatten(tree), state)

    def forget(self) -> None:
        """Remove the checkpoints of an earlier run in this folder."""
        for path in (self.folder / "checkpoints").glob("round-*.safetensors"):
            path.unlink()


def load_checkpoint(folder: Path) -> Checkpoint:
    """Return the last whole checkpoint of a run, its settings under today's names.

    Raises
    ------
    ResumeError
        If there is none.
    """
    require_checkpoint(folder)
    try:
        checkpoint = _store(folder).latest()
    except ValueError as error:
        raise ResumeError(str(error)) from error
    assert checkpoint is not None, "a checkpoint went away between two looks at the folder"
    settings = renamed_settings(checkpoint.state["settings"])
    overrides = renamed_overrides(checkpoint.state["overrides"])
    state = {**checkpoint.state, "settings": settings, "overrides": overrides}
    return replace(checkpoint, state=state)


def check_resumable(checkpoint: Checkpoint, settings: Settings) -> None:
    """Reject settings that may not change when a run is resumed.

    Raises
    ------
    ResumeError
        Naming the first setting that differs, with both values.
    """
    then = flatten(checkpoint.state["settings"], ".")
    now = flatten(plain_settings(settings), ".")
    free = set(resumable_settings())
    # What was decided by itself may be named.
    if now.get(SETTING) in checkpoint.state.get("precisions", {}).values():
        free |= {SETTING} if then.get(SETTING) == "auto" else set()
    for name in sorted({*then, *now}):
        if name not in free and then.get(name) != now.get(name):
            if name not in then:
                raise ResumeError(
                    f"{name}={now[name]}: the run to resume is of a version without this setting; "
                    "go on with that version, or start a new run"
                )
            raise ResumeError(
                f"{name}={now.get(name)}: the run to resume has {then.get(name)}; only how long, "
                "where and how fast it runs may change"
            )
    rounds = settings.federation.num_rounds
    if rounds < checkpoint.server_round:
        raise ResumeError(
            f"federation.num_rounds={rounds}: {checkpoint.server_round} rounds are already done"
        )


def agreed_before(
    checkpoint: Checkpoint, label_names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Numbering]:
    """Return the classes of the resumed run, and its numbers of nodes.

    Parameters
    ----------
    label_names
        The classes that settings or central data give now; None if the nodes name them.

    Raises
    ------
    ResumeError
        If they differ: the head has an output for each, in their order.
    """
    # Checkpoints had neither while every node had a partition.
    then = tuple(checkpoint.state.get("label_names", label_names or ()))
    if label_names not in (None, then):
        changed = sorted(set(then) ^ set(label_names or ()))
        raise ResumeError(
            f"the data have {len(label_names or ())} classes, the run to resume has {len(then)}; "
            + (f"{changed[0]!r} is not in both" if changed else "they are in another order")
        )
    return then, Numbering.from_json(checkpoint.state.get("node_numbers", {}))


def resume(
    checkpoint: Checkpoint, settings: Settings, strategy: Strategy, report: RunReport, grid: Grid
) -> None:
    """Restore a prepared run from its checkpoint.

    Raises
    ------
    ResumeError
        If the clients' states are lost, or ``client.precision=auto`` now means another precision.
    """
    then = checkpoint.state.get("precisions", {})
    profiles = strategy.coordinator.directory.in_order()
    if changed := changed_precision(then, settings, profiles):
        raise ResumeError(changed)
    tree = unflatten(checkpoint.tensors)
    _restore_client_states(checkpoint, tree.get("clients", {}), grid)
    if (cohort := checkpoint.state.get("cohort")) and isinstance(grid, TrainsCohorts):
        grid.keep_cohort_choice(CohortChoice(**cohort))
    restore(strategy, Snapshot(tree["strategy"], checkpoint.state["strategy"]))
    # The run's own key, so that a round that is computed again is the same release.
    privacy = replace(strategy.options.privacy, noise_key=checkpoint.state["noise_key"])
    strategy.options = replace(strategy.options, privacy=privacy)
    report.resume(checkpoint.server_round, checkpoint.state["report"], tree.get("report", {}))
    for line in _changes(checkpoint, settings, strategy, report):
        _LOGGER.warning(line)


def _changes(
    checkpoint: Checkpoint, settings: Settings, strategy: Strategy, report: RunReport
) -> Iterator[str]:
    """Yield what a resumed run does otherwise than its user may expect."""
    if report.stop_reason:
        yield (
            f"no round follows round {checkpoint.server_round}: {report.stop_reason}; a larger "
            "one, or 0, goes on"
        )
        return
    kind, now = settings.client.schedule.kind, settings.federation.num_rounds
    then = checkpoint.state["settings"]["federation"]["num_rounds"]
    if kind != "constant" and then != now and checkpoint.server_round < now:
        rate = strategy.options.rate(checkpoint.server_round + 1) * settings.client.learning_rate
        yield (
            f"client.schedule.kind={kind} now falls over {now} rounds instead of {then}: round "
            f"{checkpoint.server_round + 1} has a learning rate of {rate:.3g}; the rounds before "
            "it are not repeated"
        )


def _store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints")


def _restore_client_states(checkpoint: Checkpoint, tree: Mapping[str, Any], grid: Grid) -> None:
    settings = checkpoint.state["settings"]
    if settings["model"]["head"] != "local" and settings["federation"]["upload"] == "fp32":
        return  # clients keep nothing
    if not (checkpoint.state["client_states_kept"] and isinstance(grid, KeepsClientState)):
        if settings["model"]["head"] == "local":
            raise ResumeError(
                "model.head=local: each client keeps its own head, which only engine=inprocess "
                "restores when a run is resumed"
            )
        _LOGGER.warning(
            "federation.upload=%s: the rounding errors kept by the clients are lost, which only "
            "engine=inprocess restores when a run is resumed",
            settings["federation"]["upload"],
        )
        return
    grid.set_client_states(
        {
            int(partition_id): RecordDict({n: ArrayRecord(dict(a)) for n, a in records.items()})
            for partition_id, records in tree.items()
        }
    )


def _client_tree(states: Mapping[int, RecordDict]) -> dict[str, Any]:
    return {
        str(partition_id): {
            name: dict(record.to_torch_state_dict()) for name, record in state.array_records.items()
        }
        for partition_id, state in states.items()
    }
