"""What a saved adapter's folder says of it, read without torch."""

import json
from pathlib import Path
from typing import Any, Final

CARD_FILE: Final = "hafl.json"


class SavedAdapterError(ValueError):
    """A folder that is no saved adapter, or does not fit its base model."""


def adapter_folder(source: Path) -> Path:
    """Return the adapter's folder of a run, its last round's; any other folder is one itself."""
    nested = source / "adapter"
    return nested if nested.is_dir() else source


def read_card(folder: Path) -> Any:
    """Return what `hafl_app.training.adapter_files.save_adapter` wrote of an adapter, unchecked.

    Raises
    ------
    SavedAdapterError
        If there is no such file, or it is no JSON.
    """
    try:
        return json.loads((folder / CARD_FILE).read_text())
    except (OSError, ValueError) as error:
        raise SavedAdapterError(f"{folder}: not a saved adapter: {error}") from error
