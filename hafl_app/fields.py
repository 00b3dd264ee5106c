"""Fields of settings: what a value may be, and whether a run that goes on may change it.

Every room declares its settings as dataclasses whose fields carry this as metadata; `conf/` is
checked against it, and `docs/settings.md` is written from it. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, field
from typing import Any, Final

REQUIRED: Final[Any] = "???"
"""Default of a setting that `conf/` or the user must give; OmegaConf's mark for it."""

LIMIT_WORDS: Final[Mapping[str, str]] = {
    "at_least": "at least",
    "above": "above",
    "at_most": "at most",
    "below": "below",
}
"""The kinds of limits that a number may have, in words."""


def setting(default: Any, *, resumable: bool = False, hashed: bool = True) -> Any:
    """Field without limits.

    Parameters
    ----------
    resumable
        Whether a run that goes on may have another value: it decides how long, where and how fast
        the run goes, not what is learned.
    hashed
        False for lists and dictionaries in a dataclass that is a key: they count in its equality
        alone.
    """
    return _field(default, {}, resumable, hashed)


def number(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    resumable: bool = False,
) -> Any:
    """Field with a range; `None` as a value is not checked. See `setting` for ``resumable``."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    given = {kind: limit for kind, limit in limits.items() if limit is not None}
    return _field(default, {"limits": given}, resumable)


def numbers(*, at_least: float | None = None, above: float | None = None) -> Any:
    """Field of a list of numbers, empty by default, each of which has a range."""
    limits = {"at_least": at_least, "above": above}
    given = {kind: limit for kind, limit in limits.items() if limit is not None}
    return field(default_factory=list, metadata={"limits": given, "resumable": False})


def choice(default: Any, *values: str, resumable: bool = False) -> Any:
    """Field that takes one of a few words. See `setting` for ``resumable``."""
    return _field(default, {"choices": values}, resumable)


def choices_of(settings: type, name: str) -> tuple[str, ...]:
    """Return the words that a `choice` of a dataclass takes."""
    choices: tuple[str, ...] = settings.__dataclass_fields__[name].metadata["choices"]  # type: ignore[attr-defined]
    return choices


def is_resumable(declared: "Field[Any]") -> bool:
    """Whether a resumed run may have another value of this setting."""
    return bool(declared.metadata.get("resumable", False))


def default_of(declared: "Field[Any]") -> Any:
    """Return the default of a field, `REQUIRED` if there is none."""
    if declared.default is not MISSING:
        return declared.default
    return REQUIRED if declared.default_factory is MISSING else declared.default_factory()


def _field(default: Any, metadata: dict[str, Any], resumable: bool, hashed: bool = True) -> Any:
    # None: as the dataclass decides, which leaves the field out where there is no hash at all.
    return field(
        default=default,
        hash=None if hashed else False,
        metadata={**metadata, "resumable": resumable},
    )
