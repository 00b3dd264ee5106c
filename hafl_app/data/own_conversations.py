"""A node's own file of conversations: its rows stay on the device."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from hafl_app.data.conversation_columns import TEXT_COLUMNS, recognized
from hafl_app.data.conversations import ONE_CLASS, with_conversations
from hafl_app.data.errors import DataError, UnfitDataError
from hafl_app.data.files import read_table
from hafl_app.data.folders import resolve
from hafl_app.data.own_file import OwnFile
from hafl_app.data.pairs import Pairs
from hafl_app.data.shares import Share
from hafl_app.data.splits import Rows, split_off
from hafl_app.data.tables import shuffled
from hafl_app.data.text import EncodedText, TokenizePairs, encode_pairs


class OwnConversations:
    """Conversations of a node's own file, read and tokenized when first asked for.

    The held-out rows follow from the seed and the file alone, as those of
    `hafl_app.data.own_file.OwnText`.

    Parameters
    ----------
    file
        Where it stands, and the kind of its columns.
    system_prompt
        First message of rows that have no system message; None: none.
    holdout_fraction
        Share of the rows in [0, 1) that the node does not train on.
    seed
        Of the held-out rows.
    tokenize_pairs, tokenizer_key, cache
        As in `hafl_app.data.federated.FederatedText`.
    """

    def __init__(
        self,
        file: OwnFile,
        *,
        system_prompt: str | None,
        holdout_fraction: float,
        seed: int,
        tokenize_pairs: TokenizePairs,
        tokenizer_key: str,
        cache: Path | None,
    ) -> None:
        self._file = file
        self._system_prompt = system_prompt
        self._holdout_fraction = holdout_fraction
        self._seed = seed
        self._tokenize_pairs = tokenize_pairs
        self._tokenizer_key = tokenizer_key
        self._cache = cache

    def share(self, label_names: Sequence[str] | None = None) -> Share:
        """Return this node's data; conversations have no classes, so the run's are left alone.

        Raises
        ------
        UnfitDataError
            If the file has no columns of conversations.
        DataError
            If the file cannot be read, has no rows, or a row is no conversation.
        """
        train, holdout = self._split
        return Share(
            tuple(label_names or (ONE_CLASS,)),
            len(train),
            lambda: self._answered(train),
            lambda: self._encoded.select(holdout).with_answers(),
            lambda: self._pairs(holdout),
        )

    def _pairs(self, rows: Rows) -> Pairs:
        table = self._rows.iloc[rows]
        prompts, answers = table["text"].tolist(), table["answer"].tolist()
        return Pairs(prompts, answers, [ONE_CLASS] * len(table))

    def _answered(self, rows: Rows) -> EncodedText:
        if not len(answered := self._encoded.select(rows).with_answers()):
            raise UnfitDataError(
                "no row of this node keeps a token of its answer; raise dataset.max_length, or "
                "max-length in its --node-config",
                f"{len(rows)} rows",
            )
        return answered

    @cached_property
    def _rows(self) -> pd.DataFrame:
        """The rows that the run takes, in a random order: messages and answer."""
        file = self._file
        path = resolve(file.path, "data-path")
        table = read_table(path, TEXT_COLUMNS)
        try:
            recognized(table.columns, file.format, str(path))
        except DataError as error:
            raise UnfitDataError(
                "this node's file has no columns of conversations, or those of several kinds; "
                "data-format in its --node-config names the kind",
                str(error),
            ) from None
        rows = with_conversations(
            table, file.format, "", str(path), system_prompt=self._system_prompt
        )
        return shuffled(rows, file.max_examples, (file.data_seed, 0))

    @cached_property
    def _split(self) -> tuple[Rows, Rows]:
        return split_off(np.arange(len(self._rows)), self._holdout_fraction, self._seed)

    @cached_property
    def _encoded(self) -> EncodedText:
        rows = self._rows
        return encode_pairs(
            rows["text"].tolist(),
            rows["answer"].tolist(),
            np.zeros(len(rows), dtype=np.int64),
            self._tokenize_pairs,
            self._cache,
            self._tokenizer_key,
        )
