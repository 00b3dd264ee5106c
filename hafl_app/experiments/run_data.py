"""The data of a run, as overrides: which rows each of its clients trained on and held out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hafl_app.config.compose import SettingsError, quoted
from hafl_app.data.combinations import ON_DEVICE
from hafl_app.publishing.run_facts import read_run

_GROUPS = ("dataset", "partition")


def data_of_run(adapter: Path) -> list[str]:
    """Return the settings that decided the clients' rows in the run of an adapter.

    Raises
    ------
    SettingsError
        If the folder is in no run's, or the rows are on the run's nodes.
    """
    facts = read_run(adapter)
    federation = facts.settings.get("federation")
    if not isinstance(federation, Mapping) or not facts.setting("dataset", "source"):
        raise SettingsError(
            f"by=client: {adapter} is in no run's folder, whose config.yaml says which rows its "
            "clients held out"
        )
    if facts.setting("dataset", "source") == ON_DEVICE:
        raise SettingsError("by=client: the rows of dataset=on_device are on the nodes alone")
    return [
        *(one for group in _GROUPS for one in _overrides(group, facts.settings[group])),
        f"federation.num_clients={federation['num_clients']}",
        f"seed={facts.settings.get('seed', 0)}",
    ]


def _overrides(group: str, values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield f"{group}.{name}={_word(value)}"


def _word(value: Any) -> str:
    """Return a plain value as Hydra reads it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(map(_word, value))}]"
        case str():
            return quoted(value)
        case _:
            return str(value)
