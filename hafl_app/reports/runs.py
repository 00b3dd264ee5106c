"""Runs read from their folders: settings, records as frames, and what stands beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hafl_app.reports.curve import Curve, read_curve
from hafl_app.reports.records import (
    CLIENT,
    UnreadableRunError,
    read_details,
    read_records,
    read_summary,
    rounds_of,
)
from hafl_app.tracking.details import ANSWERS, IMPORTANCE, SCORES

_DATA_FILE = "data.json"
_INFLUENCE = "influence"  # of each client, in the records of rounds that have it
_FOREIGN = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)


@dataclass(frozen=True)
class Run:
    """A run, read from its folder as far as it is asked for.

    Parameters
    ----------
    folder
        Of the run.
    settings
        Dotted name to value, ``client.learning_rate`` for example; lists as text.
    summary
        As the run wrote it; empty before its end.
    curve
        Scores and bytes by round.
    """

    folder: Path
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    curve: Curve

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.settings.get("seed", 0))

    @property
    def method(self) -> str:
        """Name of the strategy's module, as in ``strategy=NAME``."""
        return method_of(self.settings)

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        return read_records(self.folder)

    @cached_property
    def _details(self) -> list[dict[str, Any]]:
        return read_details(self.folder)

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """A row a round from round 0, the index: scores, seconds, bytes and replies."""
        return self._read(lambda: _rounds(rounds_of(self._records)))

    @cached_property
    def clients(self) -> pd.DataFrame:
        """A row for each training of a client that counted, and each that did not (`error`)."""
        kept = [record for record in self._records if record["kind"] == CLIENT]
        return self._read(lambda: pd.DataFrame(kept))

    @cached_property
    def scores(self) -> pd.DataFrame:
        """A row for each client and round in which it scored its slice; metrics by name."""
        kept = [record for record in self._details if record["kind"] == SCORES]
        return self._read(lambda: _widened(kept))

    @cached_property
    def answers(self) -> pd.DataFrame:
        """A row a round and watched prompt: what it is and what the global adapter answered."""
        kept = [record for record in self._details if record["kind"] == ANSWERS]
        return self._read(
            lambda: pd.DataFrame(
                [
                    {"server_round": record["server_round"], **one}
                    for record in kept
                    for one in record["answers"]
                ]
            )
        )

    @cached_property
    def importance(self) -> pd.DataFrame:
        """A row a round, module and component: ``importance``, NaN if not measured; ``measure``."""
        kept = [record for record in self._details if record["kind"] == IMPORTANCE]
        return self._read(lambda: _importance(kept))

    @cached_property
    def influence(self) -> pd.DataFrame:
        """A row a round and client: its shares of the step, ``influence``, and of the data.

        ``examples``, and ``components``, the share of examples times trained components. Empty
        where none was recorded.
        """
        return self._read(
            lambda: pd.DataFrame(
                [
                    {"server_round": record["server_round"], **one}
                    for record in rounds_of(self._records)
                    for one in record.get(_INFLUENCE) or ()
                ]
            )
        )

    @cached_property
    def labels(self) -> pd.DataFrame:
        """Training rows by class, the index, and client, the columns; empty where not known."""
        path = self.folder / _DATA_FILE
        if not path.exists():
            return pd.DataFrame()
        return self._read(lambda: labels_frame(json.loads(path.read_text(encoding="utf-8"))))

    def _read(self, read: Any) -> pd.DataFrame:
        try:
            frame: pd.DataFrame = read()
        except _FOREIGN as error:
            raise UnreadableRunError(
                f"{self.folder}: its records are no run's: {type(error).__name__}: {error}"
            ) from error
        return frame


def read_run(folder: Path) -> Run:
    """Read a run; frames are read when they are first asked for.

    Raises
    ------
    UnreadableRunError
        If the folder is not one of a run that can be read.
    """
    path = folder / "config.yaml"
    curve = read_curve(folder)
    try:
        settings = flattened(yaml.safe_load(path.read_text(encoding="utf-8")))
        int(settings.get("seed", 0))
    except (OSError, yaml.YAMLError, *_FOREIGN) as error:
        line = " ".join(str(error).split())
        raise UnreadableRunError(f"{folder}: no readable {path.name}: {line}") from error
    return Run(folder, settings, read_summary(folder), curve)


def read_history(folder: Path) -> pd.DataFrame:
    """Return a row a round, see `Run.rounds`.

    Raises
    ------
    UnreadableRunError
        See `hafl_app.reports.records.read_records`.
    """
    return _rounds(rounds_of(read_records(folder)))


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name; a list, and an empty group, as text.

    Raises
    ------
    TypeError
        If they are no mapping.
    """
    if not isinstance(settings, Mapping):
        raise TypeError("expected settings by name")
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            plain = value is None or isinstance(value, str | int | float | bool)
            flat[f"{prefix}{name}"] = value if plain else value_text(value)
    return flat


def value_text(value: Any) -> str:
    """Return a setting's value in words: of a list of groups, what is set in each."""
    match value:
        case float():
            return f"{value:g}"
        case Mapping():
            its = ((k, v) for k, v in value.items() if v not in ({}, [], None))
            return " ".join(f"{name} {value_text(one)}" for name, one in its)
        case list():
            between = "; " if any(isinstance(one, Mapping) for one in value) else ", "
            return between.join(map(value_text, value))
        case _:
            return str(value)


def method_of(settings: Mapping[str, Any]) -> str:
    """Return the strategy's name of flat settings; empty where there is none."""
    return str(settings.get("strategy._target_", "")).rpartition(".")[0].rpartition(".")[2]


def labels_frame(account: Mapping[str, Any]) -> pd.DataFrame:
    """Return an account of data as `Run.labels`, see `hafl_app.data.account.DataAccount`."""
    clients = {number: client["labels"] for number, client in enumerate(account["clients"])}
    names = [str(name) for name in account["label_names"]]
    if not clients or not names:
        return pd.DataFrame()
    return pd.DataFrame(clients).reindex(names).fillna(0).astype(int)


def _rounds(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return _widened(records).set_index("server_round")


def _widened(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return records with a column for each of their metrics."""
    apart = {"kind", "metrics", _INFLUENCE}
    rest = [{k: v for k, v in record.items() if k not in apart} for record in records]
    rows = [{**row, **record["metrics"]} for row, record in zip(rest, records, strict=True)]
    return pd.DataFrame(rows)


def _importance(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    rows = [
        (record["server_round"], record["measure"], module, component, value)
        for record in records
        for module, values in record["modules"].items()
        for component, value in enumerate(values, start=1)
    ]
    columns = ["server_round", "measure", "module", "component", "importance"]
    return pd.DataFrame(rows, columns=columns).astype({"importance": float})
