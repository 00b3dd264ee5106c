"""Fields of settings: what a value may be, and whether a run that goes on may change it.

Every room declares its settings as dataclasses whose fields carry this as metadata; `conf/` is
checked against it, and `docs/settings.md` is written from it. Standard library only.
"""

from dataclasses import field
from typing import Any, Final

REQUIRED: Final[Any] = "???"
"""Default of a setting that `conf/` or the user must give; OmegaConf's mark for it."""


def number(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Field with a range; `None` as a value is not checked."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(
        default=default,
        metadata={"limits": {k: v for k, v in limits.items() if v is not None}},
    )


def choice(default: Any, *values: str) -> Any:
    """Field that takes one of a few words."""
    return field(default=default, metadata={"choices": values})
