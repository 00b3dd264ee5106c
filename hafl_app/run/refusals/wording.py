"""How a refused combination is put into words."""

from hafl_app.config.schema import Settings


def word(value: object) -> str:
    """Write a value as on the command line."""
    return "null" if value is None else str(value)


def value_of(settings: Settings, name: str) -> object:
    """Return the value of ``group.setting``."""
    group, _, field = name.partition(".")
    return getattr(getattr(settings, group), field)


def method_name(settings: Settings) -> str:
    """Return the name of the method, as after ``strategy=``."""
    return type(settings.strategy).__module__.rpartition(".")[2]
