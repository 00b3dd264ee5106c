"""Size of a message's content in bytes as Flower sends it, without serializing its arrays.

Flower sends a content as a tree of objects (the content, its records, their arrays, pieces of
these), each with a head that names its children by the SHA-256 of what they serialize to, and
sends an object that occurs twice once. Serializing and hashing the arrays to count them would cost
several times what copying them does; their sizes follow from their lengths, and which of them are
the same from comparing them. Read from flwr 1.41.0; a test compares with its own serialization.
"""

import json
from collections.abc import Hashable, Iterator

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES

_ID = "0" * 64  # as long as an object's id, a SHA-256 in hex
_SAMPLE_BYTES = 192  # of each end of a piece, more than the header of an array, and in between
Sample = tuple[int, bytes, bytes]


def content_size(content: RecordDict) -> int:
    """Count the bytes of a content's object tree, every distinct object once.

    Equals the sum of ``len(object.deflate())`` over the distinct objects of the tree.
    """
    return _Tree().size(content)


class _Tree:
    """Numbers the distinct objects of one content and adds up their sizes."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._pieces = _Pieces()
        self._total = 0

    def size(self, content: RecordDict) -> int:
        names, numbers = list(content), [self._record(record) for record in content.values()]
        return self._total + _object_size("RecordDict", len(set(numbers)), _references(names))

    def _record(self, record: object) -> int:
        if not isinstance(record, ArrayRecord):
            deflated: bytes = record.deflate()  # type: ignore[attr-defined]
            return self._number(deflated, len(deflated))
        names, numbers = list(record), [self._array(array) for array in record.values()]
        size = _object_size("ArrayRecord", len(set(numbers)), _references(names))
        return self._number(("record", *names, *numbers), size)

    def _array(self, array: Array) -> int:
        pieces = [self._piece(piece) for piece in _pieces_of(array.data)]
        distinct = list(dict.fromkeys(pieces))
        about = {
            "dtype": array.dtype,
            "shape": array.shape,
            "stype": array.stype,
            "arraychunk_ids": [distinct.index(piece) for piece in pieces],
        }
        body = json.dumps(about)
        # Flower identifies arrays by these words and their pieces, whatever types they have.
        return self._number((body, *distinct), _object_size("Array", len(distinct), len(body)))

    def _piece(self, piece: memoryview) -> int:
        return self._number(self._pieces.key(piece), _object_size("ArrayChunk", 0, len(piece)))

    def _number(self, key: Hashable, size: int) -> int:
        """Return the number of an object, and count it if it is new."""
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._total += size
        return self._numbers[key]


class _Pieces:
    """Keys of pieces of arrays: the same for the same bytes, found without reading most of them.

    A piece is read as a whole only if another one is as long and the same at a few hundred places.
    """

    def __init__(self) -> None:
        self._first: dict[Sample, memoryview | None] = {}  # None: `_whole` has it
        self._whole: dict[bytes, int] = {}

    def key(self, piece: memoryview) -> Hashable:
        ends = bytes(piece[:_SAMPLE_BYTES]) + bytes(piece[-_SAMPLE_BYTES:])
        sample = (len(piece), ends, bytes(piece[:: len(piece) // _SAMPLE_BYTES + 1]))
        if sample not in self._first:
            self._first[sample] = piece
            return (sample, 0)
        first = self._first[sample]
        if first is not None:
            self._whole[bytes(first)] = 0
            self._first[sample] = None
        return (sample, self._whole.setdefault(bytes(piece), len(self._whole)))


def _pieces_of(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : start + CHUNK_BYTES] for start in range(0, len(view), CHUNK_BYTES))


def _references(names: list[str]) -> int:
    """Return the length of a record's references: the ids of its children by name."""
    return len(json.dumps(dict.fromkeys(names, _ID)))


def _object_size(kind: str, num_children: int, body_bytes: int) -> int:
    """Return the size of an object: a head of ``kind ids length``, a zero byte, and its body."""
    ids = num_children * (len(_ID) + 1) - 1 if num_children else 0
    return len(kind) + 1 + ids + 1 + len(str(body_bytes)) + 1 + body_bytes
