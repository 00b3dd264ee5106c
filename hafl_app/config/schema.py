"""Schema of `conf/`: every setting with its type, default, unit and range.

Hydra merges the files of `conf/` into these dataclasses, so a wrong key or type fails when the
settings are composed. Ranges stand in the fields' metadata and are checked by
`hafl_app.config.compose`.
"""

from dataclasses import dataclass, field
from typing import Any

from hafl_app.data.settings import DatasetSettings, PartitionSettings
from hafl_app.fields import REQUIRED, choice, number
from hafl_app.privacy.settings import PrivacySettings
from hafl_app.server.settings import FederationSettings
from hafl_app.tracking.settings import TrackingSettings
from hafl_app.training.settings import ClientSettings, LoraSettings, ModelSettings


@dataclass
class RankTier:
    """A class of devices: its rank budget and its share of the clients.

    `rank_pattern` gives layer types their own rank, like PEFT's setting of that name: a regular
    expression for the module's name, or for an end of it after a dot, to the rank.
    """

    rank: int = REQUIRED
    share: float = REQUIRED
    rank_pattern: dict[str, int] = field(default_factory=dict)


@dataclass
class RanksSettings:
    """Rank budgets of nodes whose `--node-config` has no `rank`.

    `tiers` are scaled to the number of clients; `order` is `ascending` (the first partitions are
    the weakest) or `shuffled` by the seed.

    With `source` `memory` each node takes the largest rank up to its tier's whose training step
    fits into its memory, of which the share `memory_margin` stays free. `memory_limit_mb` (MB of
    10^6 bytes; `memory-mb` in a node's config goes before it) limits the whole process on a CPU
    and the tensors on a GPU; null is what is free when the node is asked, so that the ranks of two
    runs may differ.
    """

    tiers: list[RankTier] = REQUIRED
    order: str = choice("ascending", "ascending", "shuffled")
    source: str = choice("tiers", "tiers", "memory")
    memory_margin: float = number(0.1, at_least=0, below=1)
    memory_limit_mb: int | None = number(None, at_least=1)


@dataclass
class MethodSettings:
    """One line of a comparison: overrides on top of the experiment's.

    `learning_rate` is used when the grid is not searched (null: `client.learning_rate`).
    `equal_mean_bytes` names another method: this one then trains at the one rank whose mean bytes
    per client, up and down, head included, come closest to that method's from below.
    """

    overrides: list[str] = field(default_factory=list)
    learning_rate: float | None = number(None, above=0)
    equal_mean_bytes: str | None = None


@dataclass
class TuningSettings:
    """Search for each method's learning rate, on a seed that the comparison does not use.

    The highest validation accuracy after `num_rounds` rounds (null: as many as the comparison)
    wins. `per_cell` searches in every cell; otherwise only in the first, for all.
    """

    learning_rates: list[float] = field(default_factory=list)
    seed: int = number(1000, at_least=0)
    num_rounds: int | None = number(None, at_least=1)
    per_cell: bool = False


@dataclass
class CompareSettings:
    """What `scripts/compare.py` runs; a single federation does not look at it.

    `methods` and `cells` have names without spaces; a cell is a list of overrides, and every
    method runs in every cell. `baseline` is the method whose final accuracy the others are timed
    to.
    """

    baseline: str = ""
    methods: dict[str, MethodSettings] = field(default_factory=dict)
    cells: dict[str, list[str]] = field(default_factory=dict)
    tuning: TuningSettings = field(default_factory=TuningSettings)


@dataclass
class Settings:
    """All settings of a run. `output_dir` null means `outputs/<date>/<time>-<strategy>`.

    `resume` is the folder of an earlier run, whose last checkpoint this one goes on from.
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
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)
    seed: int = number(0, at_least=0)
    engine: str = choice("ray", "ray", "inprocess")
    output_dir: str | None = None
    resume: str | None = None
