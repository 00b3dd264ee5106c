"""Settings and results of the run that an adapter comes from, read from its folder."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hafl_app.renames import renamed_settings

_SEED_FOLDER: Final = re.compile(r"seed\d+")


@dataclass(frozen=True)
class RunFacts:
    """The run that an adapter comes from; empty for a folder by itself.

    Parameters
    ----------
    settings
        Of ``config.yaml``.
    summary
        Of ``summary.json``; empty for a run that did not finish.
    each_seed
        The metrics after the last round of this run and of the same run with other seeds, by
        seed: those in folders ``seed0``, ``seed1``, ... beside each other, as comparisons have
        them.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    each_seed: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def setting(self, group: str, name: str) -> Any:
        """Return a setting; `None` if it is not known."""
        return (self.settings.get(group) or {}).get(name)

    @property
    def clients_by_rank(self) -> dict[int, int]:
        """Number of clients of each rank, smallest rank first."""
        return dict(sorted(Counter(n["rank"] for n in self.summary.get("nodes", ())).items()))

    def spread(self, metric: str) -> tuple[float, float, int] | None:
        """Return mean and sample standard deviation over seeds, and how many; `None` for one."""
        values = [seed.get(metric) for seed in self.each_seed.values()]
        known = [float(v) for v in values if v is not None and math.isfinite(v)]
        if len(known) < 2:
            return None
        return statistics.fmean(known), statistics.stdev(known), len(known)

    def score_at_rank(self, rank: int) -> float | None:
        """Return the test score of the last round's adapter cut to a rank; None if not measured.

        It is the test score by the metric that ``summary["metric"]`` names.
        """
        rows = self.summary.get("device_ranks", ())
        scores = [r["federated"] for r in rows if r["rank"] == rank and "ranks" not in r]
        return scores[0] if scores else None


def read_run(adapter: Path) -> RunFacts:
    """Read the run that an adapter's folder is in.

    Raises
    ------
    ValueError
        If a file of the run is there and cannot be read.
    """
    run = adapter.resolve().parent
    summary = _summary(run)
    return RunFacts(_settings(run / "config.yaml"), summary, _each_seed(run, summary))


def _settings(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(file))
        return renamed_settings(settings)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        YAMLError,
        OmegaConfBaseException,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: not the settings of a run: {reason}") from error


def _summary(run: Path) -> Mapping[str, Any]:
    file = run / "summary.json"
    if not file.is_file():
        return {}
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        finished = summary["status"] == "finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the summary of a run: {error}") from error
    return summary if finished else {}


def _each_seed(run: Path, summary: Mapping[str, Any]) -> dict[int, Mapping[str, float]]:
    if not summary:
        return {}
    found = {summary.get("seed", 0): summary.get("final", {})}
    if not _SEED_FOLDER.fullmatch(run.name):
        return found
    for sibling in sorted(run.parent.glob("seed*")):
        other = _summary(sibling)
        same = all(other.get(name) == summary.get(name) for name in ("strategy", "rounds"))
        if other and same:
            found[other.get("seed", 0)] = other.get("final", {})
    return found
