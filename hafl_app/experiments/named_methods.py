"""Methods of a comparison that the command line names, without an experiment file."""

from collections.abc import Sequence
from typing import Final

from hafl_app.config.compose import SettingsError
from hafl_app.config.files import groups
from hafl_app.config.habits import choice_habit
from hafl_app.config.hints import nearest
from hafl_app.config.schema import MethodSettings

_BETWEEN: Final = ":"
_FORM: Final = "expected a strategy, or one with settings of its own as in hafl:scheme=truncation"


def named_methods(given: Sequence[str]) -> dict[str, MethodSettings]:
    """Return the methods by name.

    Parameters
    ----------
    given
        Each ``STRATEGY`` or ``STRATEGY:SETTING=VALUE:...``. A setting without a group is the
        strategy's, so that ``hafl:scheme=truncation`` sets ``strategy.scheme``; the method is then
        called ``hafl-scheme=truncation``.

    Raises
    ------
    SettingsError
        In one line, with the nearest right name of a strategy.
    """
    return {text.replace(_BETWEEN, "-"): _method(text) for text in given}


def _method(text: str) -> MethodSettings:
    strategy, *settings = text.split(_BETWEEN)
    files = groups()
    known = files["strategy"]
    if strategy not in known:
        if meant := choice_habit("strategy", strategy):
            raise SettingsError(f"methods={text}: no such strategy; did you mean {meant}?")
        raise SettingsError(
            f"methods={text}: no such strategy; there are {', '.join(known)}"
            f"{nearest(strategy, known)}"
        )
    overrides = [f"strategy={strategy}"]
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise SettingsError(f"methods={text}: {setting or _BETWEEN} is no setting; {_FORM}")
        of_strategy = "." not in name and name not in files
        overrides.append(f"strategy.{setting}" if of_strategy else setting)
    return MethodSettings(overrides=overrides)
