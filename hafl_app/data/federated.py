"""A federated data set: training rows per client, validation rows, test rows."""

import functools
import logging
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from hafl_app.data.account import ClientRows, DataAccount
from hafl_app.data.combinations import IMAGES, check_choices, check_sharing
from hafl_app.data.conversations import as_key
from hafl_app.data.errors import DataError
from hafl_app.data.images import encode_images
from hafl_app.data.pairs import Pairs, pairs_of
from hafl_app.data.partition import Partitioning, Rows, partition, split_off
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.shares import Share
from hafl_app.data.sources import LabeledText, load_text
from hafl_app.data.text import EncodedText, Tokenize, TokenizePairs, encode, encode_pairs

logger = logging.getLogger(__name__)


class _Part(NamedTuple):
    """Rows of the training data that one client trains and evaluates on."""

    train: Rows
    holdout: Rows


class FederatedText:
    """Text or images shared out to clients, loaded and tokenized when first asked for.

    Text has labels, or is prompts with answers. Then a row of which no token of the answer is left
    within the length that ``tokenize_pairs`` cuts to counts in `sizes`, but no client is given it.

    Validation rows are split off the training data, stratified by label, before it is shared out;
    each client's held-out rows are split off its share. All follow from the seeds alone, so
    server and clients agree on them without a message.

    Parameters
    ----------
    source
        Where the text comes from, and the shares of it that are held out.
    partitioning
        Partition of the rows; its seed also decides the splits.
    tokenize
        From a list of texts to their token ids.
    tokenizer_key
        All that ``tokenize`` depends on: the tokenizer and the length it cuts to.
    cache
        Folder for token ids; None to keep none.
    tokenize_pairs
        As ``tokenize``, for prompts with answers.

    Raises
    ------
    DataError
        If the settings do not go together.
    """

    def __init__(
        self,
        source: DatasetSettings,
        partitioning: Partitioning,
        *,
        tokenize: Tokenize,
        tokenizer_key: str,
        cache: Path | None,
        tokenize_pairs: TokenizePairs | None = None,
    ) -> None:
        check_choices(source)
        check_sharing(source, partitioning.settings.kind)
        self._source = source
        self._partitioning = partitioning
        self._tokenize = tokenize
        self._tokenize_pairs = tokenize_pairs
        self._tokenizer_key = tokenizer_key
        self._cache = cache

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self._text.label_names

    @property
    def num_partitions(self) -> int:
        """Number of clients the training data is shared out to."""
        return self._partitioning.num_partitions

    @cached_property
    def validation(self) -> EncodedText:
        """Rows of the training data that no client has; none if their share is 0."""
        return self._encoded_train.select(self._kept_and_validation[1]).with_answers()

    @cached_property
    def test(self) -> EncodedText:
        """The test set."""
        return self._encode(self._text.test, "test").with_answers()

    def train(self, partition_id: int) -> EncodedText:
        """Rows that a client trains on.

        Raises
        ------
        DataError
            If ``partition_id`` is not in [0, num_partitions), or no answer is left of any row.
        """
        rows = self._encoded_train.select(self._part(partition_id).train)
        if not len(answered := rows.with_answers()):
            raise DataError(
                f"partition {partition_id}: none of its {len(rows)} rows keeps a token of its "
                "answer; raise dataset.max_length"
            )
        return answered

    def holdout(self, partition_id: int) -> EncodedText:
        """Rows of a client's share that it evaluates on; none if their share is 0.

        Raises
        ------
        DataError
            If ``partition_id`` is not in [0, num_partitions).
        """
        return self._encoded_train.select(self._part(partition_id).holdout).with_answers()

    def holdout_pairs(self, partition_id: int) -> Pairs:
        """Prompts with answers that a client evaluates on, those without room for one too.

        Raises
        ------
        DataError
            If ``partition_id`` is not in [0, num_partitions).
        """
        rows = self._text.train.select(self._part(partition_id).holdout)
        return pairs_of(rows, self.label_names)

    def sizes(self) -> list[int]:
        """Count the rows each client trains on, without tokenizing."""
        return [len(part.train) for part in self._parts]

    def share(self, partition_id: int) -> Share:
        """Return the data of one client.

        Raises
        ------
        DataError
            If ``partition_id`` is not in [0, num_partitions).
        """
        return Share(
            self.label_names,
            len(self._part(partition_id).train),
            functools.partial(self.train, partition_id),
            functools.partial(self.holdout, partition_id),
            functools.partial(self.holdout_pairs, partition_id)
            if self._source.has_answers
            else None,
        )

    def require_answers(self) -> None:
        """Tokenize prompts with answers, and see that every part keeps rows; text has no need.

        Raises
        ------
        DataError
            If no answer is left of any row of a client, of the validation or of the test data.
        """
        if not self._source.has_answers:
            return
        for partition_id in range(self.num_partitions):
            self.train(partition_id)
        validation = self._kept_and_validation[1]
        for name, raw, kept in (
            ("validation", len(validation), len(self.validation)),
            ("test", len(self._text.test), len(self.test)),
        ):
            if raw and not kept:
                raise DataError(
                    f"none of the {raw} {name} rows keeps a token of its answer; raise "
                    "dataset.max_length"
                )

    def account(self, *, by_tokens: bool = True) -> DataAccount:
        """Count rows kept and dropped, and each client's classes.

        Parameters
        ----------
        by_tokens
            Whether to tokenize prompts with answers, to know which rows have no room for one.

        Raises
        ------
        DataError
            If the data cannot be loaded or shared out.
        """
        text, by_tokens = self._text, by_tokens and self._source.has_answers
        labels = np.asarray(text.train.with_format(None)["label"][:], dtype=np.int64)
        has_room = self._encoded_train.has_answer if by_tokens else np.ones(len(labels), bool)
        parts = [_Part(*(rows[has_room[rows]] for rows in part)) for part in self._parts]
        validation = self._kept_and_validation[1]
        used = np.concatenate([validation, *(rows for part in self._parts for rows in part)])
        test = len(self.test) if by_tokens else len(text.test)
        without = int((~has_room[used]).sum()) + len(text.test) - test
        dropped = {
            "dataset.max_examples": text.num_read[0] - len(text.train),
            "dataset.max_test_examples": text.num_read[1] - len(text.test),
            "in no partition": len(text.train) - len(used),
            "no room for an answer within dataset.max_length": without,
        }
        names = text.label_names
        trained = np.concatenate([part.train for part in parts])
        learned = self._encoded_train.select(trained) if by_tokens else None
        return DataAccount(
            names,
            {"train": text.num_read[0], "test": text.num_read[1]},
            {reason: count for reason, count in dropped.items() if count},
            int(has_room[validation].sum()),
            test,
            dict.fromkeys(names, 0) | _by_name(labels[trained], names),
            tuple(
                ClientRows(len(part.train), len(part.holdout), _by_name(labels[part.train], names))
                for part in parts
            ),
            (*text.notes, *self._repeats()),
            **(_tokens(learned) if learned is not None else {}),
        )

    def example(self) -> EncodedText | None:
        """Return a row that a client trains on; None if it has no answer to show.

        Raises
        ------
        DataError
            If the data cannot be loaded or shared out.
        """
        return self.train(0).select([0]) if self._source.has_answers else None

    def _repeats(self) -> list[str]:
        """Count texts that occur twice, which are no fault, but make scores look better."""
        if self._source.source in IMAGES:
            return []
        columns = ("text", "answer") if self._source.has_answers else ("text",)
        train, test = (
            list(zip(*(map(as_key, rows.with_format(None)[n][:]) for n in columns), strict=True))
            for rows in (self._text.train, self._text.test)
        )
        known = set(train)
        counts = {
            "training rows repeat an earlier one's text": len(train) - len(known),
            "test rows have a text that is in the training data": sum(t in known for t in test),
        }
        return [f"{count} {what}" for what, count in counts.items() if count]

    def _part(self, partition_id: int) -> _Part:
        if not 0 <= partition_id < self.num_partitions:
            raise DataError(f"partition {partition_id}: expected 0 to {self.num_partitions - 1}")
        return self._parts[partition_id]

    @cached_property
    def _text(self) -> LabeledText:
        return load_text(self._source)

    @cached_property
    def _encoded_train(self) -> EncodedText:
        # The whole set, also for one client's sake: then all clients share one file of the cache.
        return self._encode(self._text.train, "training")

    def _encode(self, rows: Dataset, split: str) -> EncodedText:
        columns = rows.with_format(None)
        if self._source.source in IMAGES:
            return encode_images(columns["pixels"][:], columns["label"][:])
        texts, labels = columns["text"][:], columns["label"][:]
        if not self._source.has_answers:
            return encode(texts, labels, self._tokenize, self._cache, self._tokenizer_key)
        if self._tokenize_pairs is None:
            raise DataError("the model cannot learn the answers of the data set, see model.task")
        pairs = encode_pairs(
            texts,
            columns["answer"][:],
            labels,
            self._tokenize_pairs,
            self._cache,
            self._tokenizer_key,
        )
        if cut := len(pairs) - len(pairs.with_answers()):
            logger.warning(
                "%d of %d %s examples are left out: their prompts leave no room for an answer "
                "within dataset.max_length",
                *(cut, len(pairs), split),
            )
        return pairs

    @cached_property
    def _kept_and_validation(self) -> tuple[Rows, Rows]:
        labels = np.asarray(self._text.train.with_format(None)["label"][:])
        rows = np.arange(len(labels))
        return split_off(rows, self._source.validation_fraction, self._partitioning.seed, labels)

    @cached_property
    def _parts(self) -> list[_Part]:
        kept, _ = self._kept_and_validation
        partitions = partition(self._text.train.select(kept), self._partitioning)
        seed = self._partitioning.seed
        return [
            # Not stratified: where most classes have a row or two, that would leave them out.
            _Part(*split_off(kept[rows], self._source.holdout_fraction, (seed, partition_id)))
            for partition_id, rows in enumerate(partitions)
        ]


def _tokens(rows: EncodedText) -> dict[str, int]:
    cut = 0 if rows.is_cut is None else int(rows.is_cut.sum())
    counted = int(rows.num_targets.sum())
    return {"tokens": len(rows.tokens), "answer_tokens": counted, "cut": cut}


def _by_name(labels: npt.NDArray[np.int64], names: tuple[str, ...]) -> dict[str, int]:
    counts = np.bincount(labels, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}
