"""Tokenised text in flat arrays, kept on disk so that only one process has to tokenise."""

import contextlib
import hashlib
import itertools
import logging
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from hafl_app.data.errors import DataError

logger = logging.getLogger(__name__)

Tokenise = Callable[[list[str]], list[list[int]]]

_WAIT_SECONDS = 600.0


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
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

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
        return EncodedText(self.tokens[source], offsets, self.labels[rows])


def encode(
    texts: Sequence[str],
    labels: npt.ArrayLike,
    tokenise: Tokenise,
    cache: Path | None,
    key: str,
) -> EncodedText:
    """Tokenise texts, or read the result of an earlier time.

    Parameters
    ----------
    texts, labels
        One label per text, shape (rows,).
    tokenise
        From a list of texts to their token ids, special tokens included, cut to length.
    cache
        Folder for the result, made if need be; None to keep none.
    key
        All that ``tokenise`` depends on: the tokenizer and the length it cuts to.

    Returns
    -------
    EncodedText
        One row per text.

    Raises
    ------
    DataError
        If there is not one label, or not one list of tokens, per text.
    """
    classes = np.asarray(labels, dtype=np.int64)
    if classes.shape != (len(texts),):
        raise DataError(f"labels of shape {classes.shape} for {len(texts)} texts")
    if cache is None:
        return _encoded(texts, classes, tokenise)
    path = cache / f"{_digest(key, texts, classes)}.npz"
    with _alone(path):
        encoded = _read(path, classes)
        if encoded is None:
            encoded = _encoded(texts, classes, tokenise)
            _write(path, encoded)
    return encoded


def _encoded(
    texts: Sequence[str], labels: npt.NDArray[np.int64], tokenise: Tokenise
) -> EncodedText:
    rows = tokenise(list(texts)) if texts else []
    if len(rows) != len(texts):
        raise DataError(f"the tokenizer made {len(rows)} rows of {len(texts)} texts")
    offsets = _offsets(np.fromiter(map(len, rows), np.int64, len(rows)))
    tokens = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(offsets[-1]))
    return EncodedText(tokens, offsets, labels)


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
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
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time look for a file of the cache and make it; the others wait.

    Without the lock no more than time is lost, so whatever is wrong with it stops nobody. The
    system lets go of it when its holder ends, however that happens.
    """
    lock = FileLock(path.parent / "locks" / path.stem, timeout=_WAIT_SECONDS)
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except TimeoutError:
        logger.warning("%s: another process does not finish it; tokenising here as well", path)
    except OSError:
        pass  # read-only: what is there can be read all the same, and `_write` tells the rest
    try:
        yield
    finally:
        lock.release()


def _read(path: Path, labels: npt.NDArray[np.int64]) -> EncodedText | None:
    """Read a file of the cache; None if it is absent, damaged or not ours."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            encoded = EncodedText(arrays["tokens"], arrays["offsets"], arrays["labels"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        logger.warning("%s is damaged and will be written again", path)
        return None
    return encoded if _is_sound(encoded, labels) else None


def _is_sound(encoded: EncodedText, labels: npt.NDArray[np.int64]) -> bool:
    tokens, offsets = encoded.tokens, encoded.offsets
    return (
        (tokens.dtype, offsets.dtype) == (np.dtype(np.int32), np.dtype(np.int64))
        and tokens.ndim == 1
        and offsets.shape == (len(labels) + 1,)
        and (int(offsets[0]), int(offsets[-1])) == (0, len(tokens))
        and bool((np.diff(offsets) >= 0).all())
        and np.array_equal(encoded.labels, labels)
    )


def _write(path: Path, encoded: EncodedText) -> None:
    """Write under another name first: others may be reading or writing the same file."""
    unfinished = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez(file, tokens=encoded.tokens, offsets=encoded.offsets, labels=encoded.labels)
        os.replace(unfinished, path)  # noqa: PTH105
    except OSError as error:
        # The cache saves time and nothing else: a full disk or a read-only home is no obstacle.
        logger.warning("cannot cache tokens: %s", error)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
