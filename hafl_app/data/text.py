"""Tokenized text in flat arrays, kept on disk so that only one process has to tokenize."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import struct
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from hafl_app.data.errors import DataError

logger = logging.getLogger(__name__)

Tokenize = Callable[[list[str]], list[list[int]]]
Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""

MaskedRows = tuple[list[list[int]], list[list[bool]], list[bool]]
"""Token ids of rows; whether each token counts in the loss; whether each row was cut."""

TokenizePairs = Callable[[Sequence[Prompt], Sequence[str]], MaskedRows]
"""From prompts and answers to rows of both."""

_WAIT_SECONDS = 600.0
_OF_ANSWERS = ("loss_mask", "is_cut")  # fields that plain text does not have
_ZIP_LENGTHS_AT = 26  # of a file's name and extra field, in its header; their content follows


@dataclass(frozen=True, eq=False)
class EncodedText:
    """Token ids of texts of different length, one after the other.

    Parameters
    ----------
    tokens
        Ids of all rows, int32, shape (sum of lengths,).
    offsets
        Where each row starts, and the end, int64, shape (rows + 1,).
    labels
        Class index of each row, int64, shape (rows,).
    loss_mask
        Of prompts with answers: whether each token counts in the loss, shape (sum of lengths,). The
        first token of a row never does: it follows nothing. None for plain text.
    is_cut
        Of prompts with answers: whether each row lost tokens to the limit, shape (rows,).
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_] | None = None
    is_cut: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each row, shape (rows,)."""
        return np.diff(self.offsets)

    def row(self, index: int) -> npt.NDArray[np.int32]:
        """Return the token ids of one row, a view of shape (length,).

        Raises
        ------
        IndexError
            If ``index`` is not in [0, rows).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}, expected 0 to {len(self) - 1}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: npt.ArrayLike) -> "EncodedText":
        """Copy some rows, in the order given.

        Parameters
        ----------
        indices
            Rows, each in [0, rows), shape (k,).

        Raises
        ------
        IndexError
            If an index is out of range.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()}, expected 0 to {len(self) - 1}")
        lengths = self.lengths[rows]
        offsets = _offsets(lengths)
        shift = self.offsets[rows] - offsets[:-1]
        source = np.arange(offsets[-1]) + np.repeat(shift, lengths)
        return EncodedText(
            self.tokens[source],
            offsets,
            self.labels[rows],
            None if self.loss_mask is None else self.loss_mask[source],
            None if self.is_cut is None else self.is_cut[rows],
        )

    @property
    def num_targets(self) -> npt.NDArray[np.int64]:
        """Tokens of each row that count in the loss, shape (rows,); of plain text none."""
        if self.loss_mask is None:
            return np.zeros(len(self), dtype=np.int64)
        counted = _offsets(self.loss_mask)
        return counted[self.offsets[1:]] - counted[self.offsets[:-1]]

    @property
    def has_answer(self) -> npt.NDArray[np.bool_]:
        """Whether each row has a token that counts, shape (rows,); all of plain text do."""
        if self.loss_mask is None:
            return np.ones(len(self), dtype=bool)
        return self.num_targets > 0

    def with_answers(self) -> "EncodedText":
        """Return the rows that have a token of their answer to predict; all rows of plain text."""
        answered = self.has_answer
        return self if answered.all() else self.select(np.flatnonzero(answered))


def encode(
    texts: Sequence[str],
    labels: npt.ArrayLike,
    tokenize: Tokenize,
    cache: Path | None,
    key: str,
) -> EncodedText:
    """Tokenize texts, or read the result of an earlier time.

    Parameters
    ----------
    texts, labels
        One label per text, shape (rows,).
    tokenize
        From a list of texts to their token ids, special tokens included, cut to length.
    cache
        Folder for the result, made if need be; None to keep none.
    key
        All that ``tokenize`` depends on: the tokenizer and the length it cuts to.

    Returns
    -------
    EncodedText
        One row per text.

    Raises
    ------
    DataError
        If there is not one label, or not one list of tokens, per text.
    """
    classes = _classes(labels, len(texts))

    def make() -> EncodedText:
        return _flat(tokenize(list(texts)) if texts else [], classes)

    return _kept(cache, key, texts, classes, make)


def encode_pairs(
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    labels: npt.ArrayLike,
    tokenize: TokenizePairs,
    cache: Path | None,
    key: str,
) -> EncodedText:
    """Tokenize prompts with their answers, or read the result of an earlier time.

    Parameters
    ----------
    prompts, answers, labels
        One of each per row, shape (rows,).
    tokenize
        From prompts and answers to rows, cut to length, and which tokens count.
    cache, key
        As in `encode`.

    Returns
    -------
    EncodedText
        One row per prompt, also where nothing of the answer is left.

    Raises
    ------
    DataError
        If there is not one answer, one label and one row of tokens per prompt.
    """
    classes = _classes(labels, len(prompts))
    if len(answers) != len(prompts):
        raise DataError(f"{len(answers)} answers for {len(prompts)} prompts")

    def make() -> EncodedText:
        rows, counts, is_cut = tokenize(prompts, answers) if prompts else ([], [], [])
        flat = _flat(rows, classes)
        return replace(flat, loss_mask=_mask(counts, flat), is_cut=np.array(is_cut, dtype=bool))

    texts = [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in prompts]
    return _kept(cache, f"{key}/masks", [*texts, *answers], classes, make)


def _mask(counts: Sequence[Sequence[bool]], rows: EncodedText) -> npt.NDArray[np.bool_]:
    if list(map(len, counts)) != rows.lengths.tolist():
        raise DataError("the tokenizer did not say of every token whether it counts")
    mask = np.fromiter(itertools.chain.from_iterable(counts), np.bool_, len(rows.tokens))
    starts = rows.offsets[:-1]
    mask[starts[starts < rows.offsets[1:]]] = False
    return mask


def _classes(labels: npt.ArrayLike, rows: int) -> npt.NDArray[np.int64]:
    classes = np.asarray(labels, dtype=np.int64)
    if classes.shape != (rows,):
        raise DataError(f"labels of shape {classes.shape} for {rows} texts")
    return classes


def _kept(
    cache: Path | None,
    key: str,
    texts: Sequence[str],
    labels: npt.NDArray[np.int64],
    make: Callable[[], EncodedText],
) -> EncodedText:
    """Read these texts from the cache, or make and store them if its file is absent or damaged."""
    if cache is None:
        return make()
    path = cache / f"{_digest(key, texts, labels)}.npz"
    with _locked(path):
        encoded = _read(path, labels)
        if encoded is None:
            encoded = make()
            _write(path, encoded)
            encoded = _read(path, labels) or encoded  # so that this process shares it as well
    return encoded


def _flat(
    rows: Sequence[Sequence[int]],
    labels: npt.NDArray[np.int64],
) -> EncodedText:
    if len(rows) != len(labels):
        raise DataError(f"the tokenizer made {len(rows)} rows of {len(labels)} texts")
    offsets = _offsets(np.fromiter(map(len, rows), np.int64, len(rows)))
    tokens = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(offsets[-1]))
    return EncodedText(tokens, offsets, labels)


def _offsets(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _digest(key: str, texts: Sequence[str], labels: npt.NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for part in (key, *texts):
        data = part.encode("utf-8", "surrogatepass")
        # With its length, or texts that differ in where one ends would share a file.
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a cache file, so that one process makes it and the others wait.

    Without the lock no more than time is lost, so whatever is wrong with it stops no process. The
    system lets go of it when its holder ends, however that happens.
    """
    lock = FileLock(path.parent / "locks" / path.stem, timeout=_WAIT_SECONDS)
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except TimeoutError:
        logger.warning("%s: another process does not finish it; tokenizing here as well", path)
    except OSError:
        pass  # read-only: what is there can be read all the same, and `_write` logs the rest
    try:
        yield
    finally:
        lock.release()


def _read(path: Path, labels: npt.NDArray[np.int64]) -> EncodedText | None:
    """Read a file of the cache; None if it is absent, damaged or not ours."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            kept = (arrays["offsets"], arrays["labels"], *map(arrays.get, _OF_ANSWERS))
            encoded = EncodedText(_mapped(path, "tokens"), *kept)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        logger.warning("%s is damaged and will be written again", path)
        return None
    return encoded if _is_sound(encoded, labels) else None


def _mapped(path: Path, name: str) -> npt.NDArray[Any]:
    """Map an array of an npz file into memory, read-only: processes share its pages.

    Raises
    ------
    ValueError
        If the array is compressed or of objects, or the file does not hold what was written.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        about = archive.getinfo(f"{name}.npy")
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        header_bytes = member.tell()
    if about.compress_type != zipfile.ZIP_STORED or dtype.hasobject:
        raise ValueError(f"{name}: compressed, or of {dtype}")
    with path.open("rb") as file:  # what stands before a file in an archive, and how long it is
        file.seek(about.header_offset + _ZIP_LENGTHS_AT)
        start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
    written = np.asarray(np.memmap(path, np.uint8, "r", start, (about.file_size,)))
    if zlib.crc32(written.data) != about.CRC:
        raise ValueError(f"{name}: another checksum")
    return written[header_bytes:].view(dtype).reshape(shape)


def _is_sound(encoded: EncodedText, labels: npt.NDArray[np.int64]) -> bool:
    tokens, offsets = encoded.tokens, encoded.offsets
    mask, is_cut = encoded.loss_mask, encoded.is_cut
    return (
        (tokens.dtype, offsets.dtype) == (np.dtype(np.int32), np.dtype(np.int64))
        and tokens.ndim == 1
        and offsets.shape == (len(labels) + 1,)
        and (int(offsets[0]), int(offsets[-1])) == (0, len(tokens))
        and bool((np.diff(offsets) >= 0).all())
        and np.array_equal(encoded.labels, labels)
        and (mask is None or (mask.dtype, mask.shape) == (np.dtype(bool), tokens.shape))
        and (is_cut is None or (is_cut.dtype, is_cut.shape) == (np.dtype(bool), labels.shape))
    )


def _write(path: Path, encoded: EncodedText) -> None:
    """Write under another name first: others may be reading or writing the same file."""
    unfinished = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: array for name, array in vars(encoded).items() if array is not None}
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)  # noqa: PTH105
    except OSError as error:
        # The cache saves time and nothing else: a full disk or a read-only home is no obstacle.
        logger.warning("cannot cache tokens: %s", error)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
