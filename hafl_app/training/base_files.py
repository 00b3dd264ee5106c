"""Whether the files of a base model are still those that a run began with."""

import hashlib
from pathlib import Path

from hafl_app.training.locate import present
from hafl_app.training.settings import BaseSpec

_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.model")
_PIECES, _PIECE_BYTES = 64, 65_536


class BaseFiles:
    """The files of a base model, hashed in samples: seconds for a model of any size.

    Parameters
    ----------
    spec
        Of the base model.
    """

    def __init__(self, spec: BaseSpec) -> None:
        self._folder = None if spec.is_without_files else present(spec)
        self._seen: tuple[object, ...] = ()
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """Return a hash over the names, the sizes and samples of the files now.

        A file of at most 4 MiB counts whole, of a larger one 64 pieces that are spread over it:
        weights that were trained any further differ in every piece. Empty without files on this
        machine. Read again only if a size or a time of a file has changed.
        """
        if self._folder is None:
            return ""
        files = sorted(path for pattern in _PATTERNS for path in self._folder.glob(pattern))
        seen = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        if seen != self._seen:
            self._seen, self._fingerprint = seen, _hash(files)
        return self._fingerprint


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with path.open("rb") as file:
            if size <= _PIECES * _PIECE_BYTES:
                digest.update(file.read())
                continue
            for piece in range(_PIECES):
                file.seek(piece * (size - _PIECE_BYTES) // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
