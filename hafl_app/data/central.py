"""The server's data when the training data stay on the nodes: a test file of its own, or none."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from hafl_app.data.account import DataAccount
from hafl_app.data.combinations import check_choices
from hafl_app.data.conversations import conversations_of, strings_of
from hafl_app.data.errors import DataError
from hafl_app.data.files import read_table
from hafl_app.data.folders import resolve
from hafl_app.data.label_rules import sorted_label_names
from hafl_app.data.labels import checked_label_names
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.tables import NOTES, index_labels, shuffled, standardize
from hafl_app.data.text import EncodedText, Tokenize, TokenizePairs, encode, encode_pairs


class CentralFile:
    """A test file on the server; there is no validation data, because the nodes share none.

    Parameters
    ----------
    source
        Its ``test_path``, columns, ``max_test_examples`` and ``data_seed`` count. Without a
        ``test_path`` neither split has rows.
    label_names
        The run's classes.
    tokenize, tokenizer_key, cache, tokenize_pairs
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
        tokenize_pairs: TokenizePairs | None = None,
    ) -> None:
        self.label_names = tuple(label_names)
        if not source.has_conversations:
            self.label_names = checked_label_names(label_names, "dataset.label_names")
        self._rows = index_labels(central_rows(source), self.label_names, "dataset.test_path")
        self._tokenize = tokenize
        self._tokenizer_key = tokenizer_key
        self._cache = cache
        self._tokenize_pairs = tokenize_pairs if source.has_conversations else None

    def account(self, *, by_tokens: bool = False) -> DataAccount:
        """Count the test rows; what the nodes have is theirs to know."""
        del by_tokens  # there are no answers
        rows = len(self._rows)
        notes = tuple(self._rows.attrs.get(NOTES, ()))
        return DataAccount(self.label_names, {"test": rows}, {}, 0, rows, notes=notes)

    def example(self) -> None:
        """Return nothing: what nodes train on is theirs to see."""

    @cached_property
    def validation(self) -> EncodedText:
        """No rows."""
        return self._encoded(self._rows.iloc[:0])

    @cached_property
    def test(self) -> EncodedText:
        """The rows of the test file; none without one."""
        return self._encoded(self._rows).with_answers()

    def _encoded(self, rows: pd.DataFrame) -> EncodedText:
        texts, labels = rows["text"].tolist(), rows["label"].to_numpy(copy=True)
        cache = self._cache if texts else None
        if self._tokenize_pairs is None:
            return encode(texts, labels, self._tokenize, cache, self._tokenizer_key)
        answers = rows["answer"].tolist()
        return encode_pairs(
            texts, answers, labels, self._tokenize_pairs, cache, self._tokenizer_key
        )


def central_rows(source: DatasetSettings) -> pd.DataFrame:
    """Return the server's test rows, none without a test file: text, label name, and any answer.

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
        return pd.DataFrame({"text": [], "answer": [], "label": []}, dtype=object)
    path = resolve(source.test_path, "dataset.test_path")
    columns = (source.text_column, source.label_column)
    check_choices(source)
    if source.has_conversations:
        asked = replace(source, label_column="")  # as on the nodes
        rows = conversations_of(read_table(path, strings_of(asked)), asked, str(path))
        return shuffled(rows, source.max_test_examples, (source.data_seed, 1))
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
