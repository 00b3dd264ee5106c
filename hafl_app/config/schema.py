"""Schema of `conf/`: the settings of every room put together, and the groups that no room owns.

Hydra merges the files of `conf/` into these dataclasses, so a wrong key or type fails when the
settings are composed. Ranges and choices stand in the fields' metadata and are checked by
`hafl_app.config.compose`. Groups that are keys of caches are frozen; each call of `compose`
returns settings of its own.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from hafl_app.data.settings import DatasetSettings, PartitionSettings
from hafl_app.fields import REQUIRED, choice, is_resumable, number, numbers, setting
from hafl_app.privacy.settings import PrivacySettings
from hafl_app.seeds import LARGEST_SEED
from hafl_app.server.devices import DevicesSettings
from hafl_app.server.settings import FederationSettings
from hafl_app.tracking.settings import TrackingSettings
from hafl_app.training.settings import ClientSettings, LoraSettings, ModelSettings


@dataclass
class RankTier:
    """A class of devices: its rank budget and its share of the clients.

    Parameters
    ----------
    rank
        Rank budget of each client, at least 1.
    share
        Weight of the tier in the number of clients, above 0.
    rank_pattern
        Ranks of layer types, like PEFT's setting of that name: a regular expression for the
        module's name, or for an end of it after a dot, to the rank.
    """

    rank: int = REQUIRED
    share: float = REQUIRED
    rank_pattern: dict[str, int] = field(default_factory=dict)


@dataclass
class RanksSettings:
    """Rank budgets of nodes whose `--node-config` has no `rank`.

    Parameters
    ----------
    tiers
        Classes of devices, whose shares are scaled to the number of clients.
    order
        ``ascending``: the first partitions are the weakest; ``shuffled`` by the seed.
    source
        ``tiers``: each node has its tier's rank. ``memory``: the largest rank up to it whose
        training step fits into the node's memory.
    memory_margin
        ``source: memory``: share of the memory that stays free.
    memory_limit_mb
        ``source: memory``: MB (10^6 bytes) of the whole process on a CPU, of the tensors on a GPU;
        ``memory-mb`` in a node's config goes before it. Null: its free memory when queried,
        so that the ranks of two runs may differ.
    """

    tiers: list[RankTier] = REQUIRED
    order: str = choice("ascending", "ascending", "shuffled")
    source: str = choice("tiers", "tiers", "memory")
    memory_margin: float = number(0.1, at_least=0, below=1)
    memory_limit_mb: int | None = number(None, at_least=1)


@dataclass
class MethodSettings:
    """Method of a comparison: overrides on top of the experiment's.

    Parameters
    ----------
    overrides
        Overrides of this method.
    learning_rate
        Learning rate when none is searched for; null: ``client.learning_rate``.
    lora_B_lr_ratio
        Learning rate of ``lora_B`` over that of ``lora_A`` when none is searched for; null:
        ``client.lora_B_lr_ratio``.
    equal_mean_bytes
        Another method: this one then trains at the one rank whose mean bytes per client, up and
        down, head included, come closest to that method's from below. Null: at its own ranks.
    centralized
        Whether this is no federation but the reference: all clients' training data in one place,
        at ``lora.max_rank``, with as many passes over the data, or steps where ``client.max_steps``
        limits them, as all clients take together.
    """

    overrides: list[str] = field(default_factory=list)
    learning_rate: float | None = number(None, above=0)
    lora_B_lr_ratio: float | None = number(None, above=0)
    equal_mean_bytes: str | None = None
    centralized: bool = False


@dataclass
class TuningSettings:
    """Search for each method's learning rates, on a seed that the comparison does not use.

    Parameters
    ----------
    learning_rates
        Rates to try; the one with the highest validation accuracy wins. Empty: no search.
    lora_B_lr_ratios
        Ratios of the learning rate of ``lora_B`` to that of ``lora_A`` to try with every rate.
        Empty: each method's own.
    seed
        Seed of the search.
    num_rounds
        Rounds of each try; null: as many as the comparison.
    per_cell
        Whether every cell searches; otherwise the first one does, for all.
    """

    learning_rates: list[float] = numbers(above=0)
    lora_B_lr_ratios: list[float] = numbers(above=0)
    seed: int = number(1000, at_least=0, at_most=LARGEST_SEED)
    num_rounds: int | None = number(None, at_least=1)
    per_cell: bool = False


@dataclass
class CompareSettings:
    """Comparison that `scripts/compare.py` runs; a single federation ignores it.

    Parameters
    ----------
    baseline
        Method whose final accuracy the others are timed to.
    methods
        Methods of the comparison, by name.
    cells
        Cells by name, each a list of overrides; every method runs in every cell.
    tuning
        Search for learning rates.
    """

    baseline: str = ""
    methods: dict[str, MethodSettings] = field(default_factory=dict)
    cells: dict[str, list[str]] = field(default_factory=dict)
    tuning: TuningSettings = field(default_factory=TuningSettings)


@dataclass
class Settings:
    """All settings of a run: its groups, and what belongs to none.

    Parameters
    ----------
    strategy
        Aggregation method and its hyper-parameters.
    model
        Base model.
    lora
        Adapter.
    dataset
        Data.
    partition
        Partition of the data among clients.
    ranks
        Rank budgets.
    client
        Local training.
    federation
        Rounds.
    privacy
        Differential privacy.
    devices
        Simulated devices and their clock.
    tracking
        Where metrics go.
    compare
        Comparison of methods.
    seed
        Seed of every draw of the run but the data's.
    engine
        ``ray``: `flwr run` with virtual clients; ``inprocess``: the same app in one process.
    name
        Name of the run in lists and trackers; null: none.
    tags
        Words by which `hafl runs` finds it.
    output_dir
        Folder of the run; null: ``outputs/<date>/<time>-<strategy>``.
    resume
        Folder of an earlier run to resume from its last checkpoint; null: a new run.
        `scripts/simulate.py` also takes ``latest``.
    """

    strategy: Any = REQUIRED
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    ranks: RanksSettings = field(default_factory=RanksSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    devices: DevicesSettings = field(default_factory=DevicesSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)
    seed: int = number(0, at_least=0, at_most=LARGEST_SEED)
    engine: str = choice("ray", "ray", "inprocess", resumable=True)
    name: str | None = setting(None, resumable=True)
    tags: list[str] = field(default_factory=list, metadata={"resumable": True})
    output_dir: str | None = setting(None, resumable=True)
    resume: str | None = setting(None, resumable=True)


class Declared(NamedTuple):
    """A setting as it is declared: its full name, its type, and its field with the metadata."""

    name: str
    type: Any
    field: "dataclasses.Field[Any]"


def declared_settings(group: type = Settings, prefix: str = "") -> Iterator[Declared]:
    """Yield every setting of a dataclass and of the dataclasses in it, in their order."""
    types = get_type_hints(group)
    for declared in dataclasses.fields(group):
        name, kind = f"{prefix}{declared.name}", types[declared.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from declared_settings(kind, f"{name}.")
        elif declared.init:
            yield Declared(name, kind, declared)


@cache
def resumable_settings() -> frozenset[str]:
    """Return the names of the settings that a run which goes on may change."""
    return frozenset(found.name for found in declared_settings() if is_resumable(found.field))
