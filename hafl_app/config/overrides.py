"""Hydra overrides as a user types them: parsed one by one, or refused in one line."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from hafl_app.printable import printable

_FORM = (
    "expected name=value; a value with spaces or special characters needs quotes, as in "
    "\"name='a value'\""
)


class SettingsError(ValueError):
    """A setting that does not exist, has the wrong type, or is out of its range."""


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides.

    Raises
    ------
    SettingsError
        Naming the first one that Hydra's grammar does not accept; the grammar's own errors speak
        of tokens and alternatives.
    """
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except (HydraException, ValueError) as error:  # also of a number with too many digits
            raise SettingsError(f"{printable(override) or repr(override)}: {_FORM}") from error
    return parsed


def sweep_refusal(override: Override) -> str:
    """Return the line that refuses several values of one setting; empty for a single value."""
    if not override.is_sweep_override():
        return ""
    return f"{override.input_line}: several values of one setting; add -m to run a job for each"


def quoted(value: object) -> str:
    """Return what stands behind ``key=`` in an override to set exactly this text."""
    return QuotedString(str(value), Quote.single).with_quotes()


def unquoted(text: str) -> str:
    """Return the text that is meant behind ``key=``: without the quotes of an override."""
    try:
        value = parse_overrides([f"key={text}"])[0].value()
    except SettingsError:
        return text  # a path may have characters that an override may not
    return value if isinstance(value, str) else text
