"""Results that are costly to find, kept in a folder by everything they depend on.

Standard library only.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def kept(
    folder: Path, key: Mapping[str, Any], kind: type[_Result], find: Callable[[], _Result]
) -> _Result:
    """Read a result from the folder, or find and store it if the file is absent or damaged.

    Parameters
    ----------
    key
        Everything that the result depends on, as values of JSON.
    kind
        Dataclass of the result, with fields of plain values.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{digest}.json"
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = find()
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(asdict(found), file)  # type: ignore[call-overload]
    os.replace(file.name, path)  # noqa: PTH105  a reader sees all of it or nothing
    return found


def cache_folder() -> Path:
    """Return the folder of what is kept: `$HAFL_CACHE`, else `hafl` in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HAFL_CACHE") or Path(root) / "hafl")
