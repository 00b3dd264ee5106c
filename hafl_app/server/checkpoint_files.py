"""Names of checkpoint files, one for each round. Standard library only."""

import re
from pathlib import Path

_FILE_NAME = re.compile(r"round-([0-9]{5,})\.safetensors")


def checkpoint_file(folder: Path, server_round: int) -> Path:
    """Return the file of a round's checkpoint."""
    return folder / f"round-{server_round:05d}.safetensors"


def newest_first(folder: Path) -> list[tuple[int, Path]]:
    """Return the rounds and files of the checkpoints in a folder, whole or not."""
    if not folder.exists():
        return []
    names = ((_FILE_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(name[1]), path) for name, path in names if name), reverse=True)
