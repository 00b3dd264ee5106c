"""A node's own file of labeled text: its texts stay, and its labels must be among the run's."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from hafl_app.data.errors import DataError, UnfitDataError
from hafl_app.data.files import read_table
from hafl_app.data.folders import resolve
from hafl_app.data.label_rules import class_fault, normal_name, sorted_label_names
from hafl_app.data.labels import label_fault
from hafl_app.data.shares import Share
from hafl_app.data.splits import Rows, split_off
from hafl_app.data.tables import index_labels, shuffled, standardize
from hafl_app.data.text import EncodedText, Tokenize, encode

_ROWS_PER_LABEL = 2  # on average, from which on labels look like classes
_MOST_NAMED = 20  # columns or labels in a node's own log


@dataclass(frozen=True)
class OwnFile:
    """A table with labeled text or conversations that belongs to one node.

    Parameters
    ----------
    path
        A csv, tsv, jsonl, json or parquet file.
    text_column, label_column
        Where text and label stand.
    max_examples
        Size of a random subset, at least 1; None for all.
    data_seed
        Seed, not negative, of the order and the subset.
    max_labels, max_label_length
        Most classes, and characters of each, whose names may leave the node; at least 1.
    format
        Kind of conversations, as ``dataset.format``; ``chat``: the kind whose columns it has.
    max_length
        Most tokens of a row, whatever the run asks for, at least 1; None: as many as that.
    max_megabytes
        Largest file that is read, in MB of 10^6 bytes, at least 1.
    """

    path: str
    text_column: str = "text"
    label_column: str = "label"
    max_examples: int | None = None
    data_seed: int = 0
    max_labels: int = 200
    max_label_length: int = 60
    format: str = "chat"
    max_length: int | None = None
    max_megabytes: int = 1000

    def version(self) -> tuple[int, int]:
        """Return a version that changes with the file: time of change in ns, and size in bytes.

        Raises
        ------
        DataError
            If there is no such file.
        UnfitDataError
            If it is larger than the node allows.
        """
        path = resolve(self.path, "data-path")
        if not path.is_file():
            raise DataError(f"data-path: expected a file, got {path}")
        status = path.stat()
        if status.st_size > self.max_megabytes * 1_000_000:
            raise UnfitDataError(
                "this node's file is larger than max-data-mb in its --node-config allows",
                f"{status.st_size / 1e6:.0f} MB, at most {self.max_megabytes}",
            )
        return status.st_mtime_ns, status.st_size


class OwnText:
    """Labeled text of a node's own file, read and tokenized when first asked for.

    The held-out rows follow from the seed and the file alone, so that they stay the same whatever
    number the server gives the node.

    Parameters
    ----------
    file
        Where it stands.
    holdout_fraction
        Share of the rows in [0, 1) that the node does not train on.
    seed
        Of the held-out rows.
    tokenize, tokenizer_key, cache
        As in `hafl_app.data.federated.FederatedText`.
    """

    def __init__(
        self,
        file: OwnFile,
        *,
        holdout_fraction: float,
        seed: int,
        tokenize: Tokenize,
        tokenizer_key: str,
        cache: Path | None,
    ) -> None:
        self._file = file
        self._holdout_fraction = holdout_fraction
        self._seed = seed
        self._tokenize = tokenize
        self._tokenizer_key = tokenizer_key
        self._cache = cache
        self._encode = functools.lru_cache(maxsize=1)(self._encode_for)

    def share(self, label_names: Sequence[str] | None = None) -> Share:
        """Return this node's data under the run's labels, or under its own if there are none yet.

        Raises
        ------
        UnfitDataError
            If a column is missing, a label is not among the run's, or the node's own labels do not
            look like names of classes, which may leave.
        DataError
            If the file cannot be read, has no rows, or a text or label is null.
        """
        names = self._released_names if label_names is None else tuple(label_names)
        self._refuse_unknown(names)
        train, holdout = self._split
        return Share(
            names,
            len(train),
            lambda: self._encode(names).select(train),
            lambda: self._encode(names).select(holdout),
        )

    @cached_property
    def _table(self) -> pd.DataFrame:
        """Every row, in a random order: text and label name."""
        file, columns = self._file, (self._file.text_column, self._file.label_column)
        path = resolve(file.path, "data-path")
        table = read_table(path, columns, self._file.label_column)
        if table.empty:
            raise DataError(f"{path} has no rows")
        self._require_columns(table)
        return shuffled(standardize(table, *columns, str(path)), None, (file.data_seed, 0))

    @property
    def _rows(self) -> pd.DataFrame:
        return self._table.iloc[: self._file.max_examples]

    @cached_property
    def _own_names(self) -> tuple[str, ...]:
        # Of all rows: which of them a run takes must not decide what the classes are.
        names = sorted_label_names(self._table["label"])
        if fault := label_fault(names) or class_fault(self._table["label"]):
            raise self._wrong_column(fault, names)
        return names

    @cached_property
    def _released_names(self) -> tuple[str, ...]:
        """The classes, once they are few, short and repeated enough to leave the node."""
        names, rows, file = self._own_names, len(self._table), self._file
        longest = max(map(len, names))
        if len(names) > file.max_labels:
            fault = f"{len(names)} labels, max-labels lets {file.max_labels} leave"
        elif longest > file.max_label_length:
            fault = f"a label of {longest} characters, max-label-length is {file.max_label_length}"
        elif _ROWS_PER_LABEL * len(names) > rows:
            fault = f"{len(names)} labels in {rows} rows, expected {_ROWS_PER_LABEL} rows of each"
        else:
            return names
        raise self._wrong_column(f"{fault} (with dataset.label_names none would)", names)

    def _wrong_column(self, fault: str, names: Sequence[str]) -> UnfitDataError:
        return UnfitDataError(
            f"this node's labels: {fault}; does label-column in its --node-config name the labels?",
            f"column {self._file.label_column!r}, the first label is {names[0][:80]!r}",
        )

    @cached_property
    def _split(self) -> tuple[Rows, Rows]:
        return split_off(np.arange(len(self._rows)), self._holdout_fraction, self._seed)

    def _encode_for(self, names: tuple[str, ...]) -> EncodedText:
        rows = index_labels(self._rows, names, "own")
        texts, labels = rows["text"].tolist(), rows["label"].to_numpy(copy=True)
        return encode(texts, labels, self._tokenize, self._cache, self._tokenizer_key)

    def _require_columns(self, table: pd.DataFrame) -> None:
        known = [str(column) for column in table.columns]
        for kind, column in (
            ("text", self._file.text_column),
            ("label", self._file.label_column),
        ):
            if column not in known:
                raise UnfitDataError(
                    f"this node's file has no {kind} column; {kind}-column in its --node-config "
                    f"names it, {kind!r} by default",
                    f"no column {column!r}, it has {_listed(known)}",
                )

    def _refuse_unknown(self, names: tuple[str, ...]) -> None:
        unknown = sorted(set(self._own_names) - set(map(normal_name, names)))
        if unknown:
            raise UnfitDataError(
                # Not how many: who may guess names would be told which are right, one by one.
                f"dataset.label_names: labels of this node are not among the {len(names)} of the "
                "run; its own log names them",
                f"unknown: {_listed(unknown)}",
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(repr(name) for name in names[:_MOST_NAMED]) + more
