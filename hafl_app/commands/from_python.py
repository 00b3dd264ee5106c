"""`hafl_app.simulate`: a run from Python, and what it leaves."""

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hafl_app.tracking.jsonl import SUMMARY_FILE

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Result:
    """Result of a finished run, read from its folder.

    Parameters
    ----------
    folder
        Of the run, absolute.
    """

    folder: Path

    @property
    def adapter(self) -> Path:
        """Folder of the last round's adapter, in PEFT's format."""
        return self.folder / "adapter"

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` says: scores, bytes, devices, versions."""
        read: dict[str, Any] = json.loads((self.folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        return read

    @property
    def metrics(self) -> dict[str, float]:
        """Scores of the last round, e.g. ``test/accuracy`` in [0, 1]."""
        final: dict[str, float] = self.summary["final"]
        return final

    @cached_property
    def history(self) -> "pd.DataFrame":
        """A row a round from round 0, the index: scores, seconds, bytes and replies."""
        from hafl_app.reports.runs import read_history  # noqa: PLC0415  pandas takes a second

        return read_history(self.folder)


def simulate(*overrides: str) -> Result:
    """Run a federation on this machine, as `hafl simulate` does.

    Parameters
    ----------
    overrides
        Settings as on the command line: ``"strategy=flexlora"``, ``"federation.num_rounds=5"``.

    Raises
    ------
    ValueError
        In one line, before anything is written: a setting that is wrong, or does not go together
        with others.
    RuntimeError, OSError
        If the run failed.
    """
    from hafl_app.commands.simulate import resumed  # noqa: PLC0415  Hydra takes a while
    from hafl_app.config.compose import SettingsError, compose  # noqa: PLC0415
    from hafl_app.engines.one_run import count_trainers, run_once  # noqa: PLC0415
    from hafl_app.run.command_line import CommandLine  # noqa: PLC0415
    from hafl_app.run.effects import without_effect  # noqa: PLC0415
    from hafl_app.run.preflight import check  # noqa: PLC0415
    from hafl_app.run.run_folder import output_folder  # noqa: PLC0415

    line = CommandLine.of(overrides)
    if line.flags:
        raise SettingsError(f"{line.flags[0]}: expected settings alone, as in seed=1")
    (job,) = resumed(line).jobs()
    settings = compose(job)
    check(settings)
    count_trainers(settings)
    for problem in without_effect([settings], overrides):
        warnings.warn(problem, stacklevel=2)
    folder = output_folder(settings)
    run_once([o for o in job if not o.startswith("output_dir=")], folder)
    return Result(folder)
