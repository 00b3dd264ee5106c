"""The node that answers a message: its settings, its data and its model in the run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, Context, RecordDict
from safetensors import SafetensorError

from hafl_app.client.base_precision import base_precision
from hafl_app.client.node_config import whole_number
from hafl_app.client.own_data import DATA_PATH, own_file, own_share
from hafl_app.client.own_factors import with_own_lora_B
from hafl_app.client.permissions import Permissions
from hafl_app.client.rank_budget import NodeLimits, rank_budget
from hafl_app.client.terms import LABELS, Terms
from hafl_app.config.compose import SettingsError
from hafl_app.config.schema import RankTier, Settings
from hafl_app.data.combinations import ON_DEVICE
from hafl_app.data.own_file import OwnFile
from hafl_app.data.shares import Share
from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.run import build
from hafl_app.seeds import client_seed
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.quantization.precisions import BLOCKWISE
from hafl_app.training.settings import TrainOptions
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.node_profile import UNNUMBERED
from hafl_app.wire.requests import TrainRequest
from hafl_app.wire.secure_sum import AskMasked

_OWN_HEAD = "local-head"
PARTITION, NUM_PARTITIONS = "partition-id", "num-partitions"
_MOST_PARTITIONS = 10**9


@dataclass(frozen=True)
class Job:
    """A request that is ready to run on this node.

    Parameters
    ----------
    server_round
        Of the request.
    number
        Of the node in the run: its partition, else the server's number for it.
    seed
        Of this node's training in this round.
    plan
        Of the request, within the node's limits.
    options
        Of local training, within the node's limits.
    adapter
        The received components, with the head and the factors that apply here.
    share
        The node's data.
    model
        The base model with LoRA layers.
    correction
        Of the gradients, if the request has one.
    secure
        The secure sum that the upload is a part of, if it is one.
    """

    server_round: int
    number: int
    seed: int
    plan: TrainPlan
    options: TrainOptions
    adapter: Adapter
    share: Share
    model: LoraModel
    correction: Adapter | None = None
    secure: AskMasked | None = None


@dataclass(frozen=True)
class Node:
    """Node of a run, as the settings and its operator describe it.

    Parameters
    ----------
    settings
        Of the run; the node's operator permits them.
    limits
        Of the node's operator.
    own
        The node's own data file; None if it takes a partition of the run's data set.
    partition_id
        From 0; `UNNUMBERED` for a node with a data file and no number of its own.
    num_partitions
        0 for an unnumbered node.
    state
        Kept between the node's messages.
    terms
        Of the node's operator; the settings meet them.
    """

    settings: Settings
    limits: NodeLimits
    own: OwnFile | None
    partition_id: int
    num_partitions: int
    state: RecordDict
    terms: Terms

    @classmethod
    def of(cls, context: Context) -> "Node":
        """Compose the run's settings and read the node's config.

        Raises
        ------
        SettingsError
            If the settings are wrong, or the node's config is incomplete.
        hafl_app.client.node_config.NodeConfigError
            If a value in the node's config is malformed.
        hafl_app.client.permissions.NotAllowedError
            If the node's operator does not permit the settings, or they do not meet the terms.
        """
        config = context.node_config
        settings = build.settings_of_run(context.run_config)
        terms = Terms.of(config)
        terms.check(settings)
        own = own_file(settings, config)
        Permissions.of(config, os.environ).check(_as_read_here(settings, own))
        if own is None and settings.dataset.source == ON_DEVICE:
            raise SettingsError(
                f"dataset=on_device: this node has no data, {DATA_PATH} in its --node-config "
                "names them"
            )
        partition_id, num_partitions = UNNUMBERED, 0
        if own is None or PARTITION in config:
            partition_id, num_partitions = _partition(config)
        limits = NodeLimits.of(config)
        return cls(settings, limits, own, partition_id, num_partitions, context.state, terms)

    @property
    def is_private(self) -> bool:
        """Whether the node adds noise to its own uploads."""
        return self.settings.privacy.kind == "local_dp"

    def prepare(self, request: TrainRequest) -> Job:
        """Load the data and the model for a request, and apply the node's limits to its plan.

        Raises
        ------
        RecordError
            If the node has no number, and the request gives none.
        hafl_app.client.permissions.NotAllowedError
            If the plan asks for what the node withholds.
        hafl_app.data.errors.DataError, ModelError
            See `share` and `model`.
        """
        self.terms.check_plan(request.plan)
        settings, number = self.settings, self._number(request)
        share = self.share(request.label_names)
        model = self.model(share)
        plan = self.limits.limit_plan(request.plan)
        adapter = with_own_lora_B(self.state, request.adapter, plan, model.shapes())
        local_epochs = settings.client.local_epochs
        return Job(
            server_round=request.server_round,
            number=number,
            seed=client_seed(settings.seed, request.server_round, number),
            plan=plan,
            options=self.limits.limit_options(build.train_options(settings), plan, local_epochs),
            adapter=self._with_own_head(adapter),
            share=share,
            model=model,
            correction=request.correction,
            secure=request.secure,
        )

    def keep_head(self, adapter: Adapter) -> None:
        """Keep a trained head for the next message, with ``model.head=local``."""
        self.state[_OWN_HEAD] = ArrayRecord(dict(adapter.head))

    def rank_budget(self, num_labels: int) -> RankTier:
        """Return the node's rank budget, see `hafl_app.client.rank_budget.rank_budget`."""
        tier = None
        if self.partition_id != UNNUMBERED:
            tier = build.client_tiers(self.settings, self.num_partitions)[self.partition_id]
        return rank_budget(self.settings, self.limits, tier, num_labels)

    def share(self, label_names: tuple[str, ...] | None) -> Share:
        """Return the node's data: its own file if it has one, else its partition.

        Parameters
        ----------
        label_names
            The run's classes; None for those in the node's own file.

        Raises
        ------
        hafl_app.data.errors.DataError
            If the data cannot be read, or do not fit the classes.
        hafl_app.client.permissions.NotAllowedError
            If the classes in the node's own file are withheld, and the run has none.
        """
        if self.own is None:
            return build.federated_text(self.settings, self.num_partitions).share(self.partition_id)
        if label_names is None:
            self.terms.check_field(LABELS, "dataset.label_names=null")
        return own_share(self.settings, self.own, label_names)

    def model(self, share: Share) -> LoraModel:
        """Return the base model with LoRA layers, loaded once in a process.

        Raises
        ------
        ModelError
            If the model's files cannot be loaded.
        """
        try:
            num_labels = len(share.label_names)
            return build.model(self.settings, num_labels, self._base_precision(share))
        except (OSError, SafetensorError) as error:  # files that were removed, or are not whole
            raise ModelError(
                f"model.path={self.settings.model.path}: cannot be loaded ({type(error).__name__})"
            ) from error

    def _number(self, request: TrainRequest) -> int:
        if self.partition_id != UNNUMBERED:
            return self.partition_id
        if request.partition_id is None:
            raise RecordError("config: 'partition-id' is None, expected a whole number from 0")
        return request.partition_id

    def _with_own_head(self, adapter: Adapter) -> Adapter:
        """Return a received adapter with the node's own head, if it keeps one and none was sent."""
        if adapter.head or _OWN_HEAD not in self.state.array_records:
            return adapter
        return adapter.with_head(self.state.array_records[_OWN_HEAD].to_torch_state_dict())

    def _base_precision(self, share: Share) -> str | None:
        """Return the precision that this node chose for its base model; None: the settings'."""
        if self.settings.model.quantization != BLOCKWISE:
            return None
        rank = self.rank_budget(len(share.label_names)).rank
        return base_precision(self.settings, self.limits, rank, share, self.state)


def _partition(node_config: Mapping[str, Any]) -> tuple[int, int]:
    """Return which partition a node has, from 0, and how many there are."""
    total = whole_number(node_config, NUM_PARTITIONS, 1, _MOST_PARTITIONS)
    if total is None or PARTITION not in node_config:
        raise SettingsError(
            f"this node's --node-config needs {PARTITION} and {NUM_PARTITIONS}, or {DATA_PATH}"
        )
    number = whole_number(node_config, PARTITION, 0, total - 1)
    return int(number or 0), total


def _as_read_here(settings: Settings, own: OwnFile | None) -> Settings:
    """Return the settings without data that this node does not read, so need not be allowed."""
    if own is None and settings.dataset.source != ON_DEVICE:
        return settings
    return replace(settings, dataset=replace(settings.dataset, path=None, test_path=None, hub=None))
