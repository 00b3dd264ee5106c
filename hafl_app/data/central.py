"""The server's data when the training data stay on the nodes: a test file of its own, or none."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

from hafl_app.data.account import DataAccount
from hafl_app.data.combinations import check_choices
from hafl_app.data.errors import DataError
from hafl_app.data.files import read_table
from hafl_app.data.folders import resolve
from hafl_app.data.label_rules import sorted_label_names
from hafl_app.data.labels import checked_label_names
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.tables import NOTES, index_labels, shuffled, standardize
from hafl_app.data.text import EncodedText, Tokenize, encode


class CentralFile:
    """A test file on the server; there is no validation data, because the nodes share none.

    Parameters
    ----------
    source
        Its ``test_path``, columns, ``max_test_examples`` and ``data_seed`` count. Without a
        ``test_path`` neither split has rows.
    label_names
        The run's classes.
    tokenize, tokenizer_key, cache
        As in `hafl_app.data.federated.FederatedText`.

    Raises
    ------
    DataError
        If the test file cannot be read, or has a label that is not among the run's.
    """

    def __init__(
        self,
        source: DatasetSettings,
        label_names: Sequence[str],
        *,
        tokenize: Tokenize,
        tokenizer_key: str,
        cache: Path | None,
    ) -> None:
        self.label_names = checked_label_names(label_names, "dataset.label_names")
        self._rows = index_labels(central_rows(source), self.label_names, "dataset.test_path")
        self._tokenize = tokenize
        self._tokenizer_key = tokenizer_key
        self._cache = cache

    def account(self, *, by_tokens: bool = False) -> DataAccount:
        """Count the test rows; what the nodes have is theirs to know."""
        del by_tokens  # there are no answers
        rows = len(self._rows)
        notes = tuple(self._rows.attrs.get(NOTES, ()))
        return DataAccount(self.label_names, {"test": rows}, {}, 0, rows, notes=notes)

    @cached_property
    def validation(self) -> EncodedText:
        """No rows."""
        return encode([], [], self._tokenize, None, self._tokenizer_key)

    @cached_property
    def test(self) -> EncodedText:
        """The rows of the test file; none without one."""
        texts, labels = self._rows["text"].tolist(), self._rows["label"].to_numpy(copy=True)
        return encode(texts, labels, self._tokenize, self._cache, self._tokenizer_key)


def central_rows(source: DatasetSettings) -> pd.DataFrame:
    """Return text and label name of the server's test rows; no rows without a test file.

    Raises
    ------
    DataError
        If the file cannot be read, or a setting names training data, which stay on the nodes.
    """
    if source.path:
        raise DataError(
            f"dataset.path={source.path!r}: with dataset=on_device each node names its own file, "
            "data-path in its --node-config"
        )
    if not source.test_path:
        return pd.DataFrame({"text": [], "label": []}, dtype=object)
    path = resolve(source.test_path, "dataset.test_path")
    columns = (source.text_column, source.label_column)
    check_choices(source)
    table = read_table(path, columns, source.label_column)
    rows = standardize(table, *columns, str(path), listed=source.label_names or ())
    return shuffled(rows, source.max_test_examples, (source.data_seed, 1))


def central_label_names(source: DatasetSettings) -> tuple[str, ...]:
    """Return the names of the classes in the server's test file, none without one.

    Raises
    ------
    DataError
        See `central_rows`.
    """
    return sorted_label_names(central_rows(source)["label"])
