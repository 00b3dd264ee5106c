"""Scores and ranks of a run's clients, from its frames."""

import math

import pandas as pd

from hafl_app.metrics import Metric
from hafl_app.reports.statistics import Spread

_TENTH = 10


def last_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the last round in which clients scored, of each run if there are several.

    Parameters
    ----------
    scores
        See `hafl_app.reports.runs.Run`; rows of several runs have a column ``seed``.
    """
    if "seed" not in scores:
        scores = scores.assign(seed=0)
    last = scores.groupby("seed")["server_round"].transform("max")
    return scores[scores["server_round"] == last].reset_index(drop=True)


def worst_tenth(scores: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Return the rows of the worst tenth of the clients, at least one."""
    ordered = scores.sort_values(metric.name, ascending=metric.higher_is_better, kind="stable")
    return ordered.head(math.ceil(len(scores) / _TENTH))


def by_rank(seeds: dict[int, pd.DataFrame], metric: Metric) -> dict[str, dict[str, Spread]]:
    """Sum up the clients' last scores by rank, and over all ranks: each a value a seed.

    Parameters
    ----------
    seeds
        Seed to the scores of a run; those without any do not count.

    Returns
    -------
    dict
        Rank, at last ``all``, to ``clients``, ``worst``, ``worst tenth``, ``mean`` and ``best``.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for scores in seeds.values():
        if scores.empty or metric.name not in scores:
            continue
        last = last_scores(scores).dropna(subset=[metric.name])
        parts = [(str(rank), rows) for rank, rows in last.groupby("rank")]
        for rank, rows in [*parts, ("all", last)]:
            if rows.empty:
                continue
            values = rows[metric.name]
            worst, best = values.min(), values.max()
            if not metric.higher_is_better:
                worst, best = best, worst
            its = {
                "clients": float(len(rows)),
                "worst": worst,
                "worst tenth": worst_tenth(rows, metric)[metric.name].mean(),
                "mean": values.mean(),
                "best": best,
            }
            for name, value in its.items():
                found.setdefault(rank, {}).setdefault(name, []).append(float(value))
    ranks = sorted((rank for rank in found if rank != "all"), key=int)
    return {
        rank: {name: Spread(tuple(values)) for name, values in found[rank].items()}
        for rank in [*ranks, *(["all"] if found else [])]
    }


def ranks_trained(clients: pd.DataFrame, num_modules: int) -> pd.DataFrame:
    """Return round, client, budget and ``rank_trained``: components trained, mean over modules.

    Trainings that did not count are left out.
    """
    if clients.empty:
        return pd.DataFrame(columns=["server_round", "partition_id", "rank", "rank_trained"])
    counted = clients[clients["error"].fillna("") == ""]
    trained = counted["components_trained"] / max(1, num_modules)
    columns = ["server_round", "partition_id", "rank"]
    return counted[columns].assign(rank_trained=trained)
