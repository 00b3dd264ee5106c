"""Partition the training rows among clients; by class or owner with flwr-datasets' partitioners.

The one module that imports flwr_datasets, and only for a partition that needs it: its package
imports seaborn, and that scipy.stats, for figures that are not drawn here.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from datasets import Dataset

from hafl_app.data.combinations import BY_CLASS
from hafl_app.data.errors import DataError, nearest, require_column
from hafl_app.data.settings import PartitionSettings
from hafl_app.data.splits import Rows, split_off

__all__ = ["Partitioning", "Rows", "partition", "split_off"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partitioning:
    """Partition of a run's training rows among clients.

    Parameters
    ----------
    settings
        The rule.
    num_partitions
        At least 1.
    seed
        Of all draws, not negative.
    """

    settings: PartitionSettings
    num_partitions: int
    seed: int


def partition(train: Dataset, partitioning: Partitioning) -> list[Rows]:
    """Share out the rows of the training data.

    ``pathological`` leaves the classes out that no partition was given; the other kinds use every
    row.

    Parameters
    ----------
    train
        Has a column ``label`` of ints.
    partitioning
        Kind and strength of the partition.

    Returns
    -------
    list of array (rows of the partition,)
        Indices of rows of ``train`` per partition, each row in at most one.

    Raises
    ------
    DataError
        If there are more partitions than rows, a partition would have fewer than
        ``min_examples`` rows, or the data does not have the classes or the column asked for.
    """
    rule = partitioning.settings
    if rule.kind not in _SHARERS:
        raise DataError(
            f"partition.kind: {rule.kind!r} is none of {', '.join(_SHARERS)}"
            f"{nearest(rule.kind, _SHARERS)}"
        )
    if not 1 <= partitioning.num_partitions <= len(train):
        raise DataError(
            f"federation.num_clients: {partitioning.num_partitions} clients cannot share "
            f"{len(train)} training examples; expected 1 to {len(train)}"
        )
    if rule.kind in BY_CLASS and len(set(_values(train, "label"))) < 2:
        raise DataError(
            f"partition.kind={rule.kind} shares out by class, but all {len(train)} rows "
            "are of one; see dataset.label_column, or take partition=iid"
        )
    partitions = _SHARERS[rule.kind](train, partitioning)
    _check_sizes(partitions, partitioning)
    unused = len(train) - sum(map(len, partitions))
    if unused:
        logger.warning("%d of %d training examples are in no partition", unused, len(train))
    return partitions


def _check_sizes(partitions: Sequence[Rows], partitioning: Partitioning) -> None:
    rule = partitioning.settings
    fewest = max(1, rule.min_examples)
    for partition_id, rows in enumerate(partitions):
        if len(rows) < fewest:
            raise DataError(
                f"partition {partition_id} of {len(partitions)} ({rule.kind}) has "
                f"{len(rows)} examples, fewer than partition.min_examples={fewest}; "
                "lower that or federation.num_clients"
            )


def _iid(train: Dataset, partitioning: Partitioning) -> list[Rows]:
    order = np.random.default_rng(partitioning.seed).permutation(len(train))
    return np.array_split(order, partitioning.num_partitions)


def _dirichlet(train: Dataset, partitioning: Partitioning) -> list[Rows]:
    from flwr_datasets.partitioner import DirichletPartitioner  # noqa: PLC0415  see above

    rule = partitioning.settings
    partitioner = DirichletPartitioner(
        num_partitions=partitioning.num_partitions,
        partition_by="label",
        alpha=float(rule.dirichlet_alpha),
        min_partition_size=rule.min_examples,
        self_balancing=False,
        seed=partitioning.seed,
    )
    remedy = (
        f"no draw with partition.dirichlet_alpha={rule.dirichlet_alpha} gave each of "
        f"{partitioning.num_partitions} clients partition.min_examples="
        f"{rule.min_examples} of {len(train)} examples; raise dirichlet_alpha, or lower "
        "min_examples or federation.num_clients"
    )
    with _as_data_error(remedy):
        return _collect(partitioner, _with_rows(train, "label"))


def _pathological(train: Dataset, partitioning: Partitioning) -> list[Rows]:
    from flwr_datasets.partitioner import PathologicalPartitioner  # noqa: PLC0415  see above

    rule = partitioning.settings
    partitioner = PathologicalPartitioner(
        num_partitions=partitioning.num_partitions,
        partition_by="label",
        num_classes_per_partition=rule.classes_per_partition,
        # As in the paper it comes from: with enough clients every class is used.
        class_assignment_mode="first-deterministic",
        seed=partitioning.seed,
    )
    classes = len(set(_values(train, "label")))
    if not 1 <= rule.classes_per_partition <= classes:
        raise DataError(
            f"partition.classes_per_partition: {rule.classes_per_partition} is not "
            f"between 1 and the {classes} classes of the training data"
        )
    remedy = (
        f"{partitioning.num_partitions} clients with {rule.classes_per_partition} of "
        f"{classes} classes each need a class more often than it has examples; lower "
        "partition.classes_per_partition or federation.num_clients"
    )
    with _as_data_error(remedy):
        return _collect(partitioner, _with_rows(train, "label"))


def _natural(train: Dataset, partitioning: Partitioning) -> list[Rows]:
    rule = partitioning.settings
    column = rule.column
    names = train.column_names
    if column is None:
        raise DataError(
            f"partition.column: 'natural' needs the column of owners, one of {', '.join(names)}"
        )
    require_column(names, column, "partition.column", "the training data")
    values = _values(train, column)
    if None in values:
        raise DataError(f"partition.column: {column!r} is empty in {values.count(None)} rows")
    num_ids = len(set(values))
    if num_ids != partitioning.num_partitions:
        raise DataError(
            f"partition.column: {column!r} has {num_ids} different ids in the training data, but "
            f"there are {partitioning.num_partitions} clients; set federation.num_clients={num_ids}"
        )
    from flwr_datasets.partitioner import NaturalIdPartitioner  # noqa: PLC0415  see above

    return _collect(NaturalIdPartitioner(column), _with_rows(train, column))


def _values(train: Dataset, column: str) -> list[Any]:
    values: list[Any] = train.with_format(None)[column][:]
    return values


def _with_rows(train: Dataset, column: str) -> Dataset:
    """Return the column that the partitioner reads, with numbers to find the rows again."""
    return Dataset.from_dict({column: _values(train, column), "row": np.arange(len(train))})


def _collect(partitioner: Any, rows: Dataset) -> list[Rows]:
    partitioner.dataset = rows
    # The partitioners print every attempt and show a progress bar.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return [
            np.asarray(partitioner.load_partition(i)["row"][:], dtype=np.int64)
            for i in range(partitioner.num_partitions)
        ]


@contextlib.contextmanager
def _as_data_error(message: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(message) from error


_SHARERS: Final[dict[str, Callable[[Dataset, Partitioning], list[Rows]]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "natural": _natural,
}
