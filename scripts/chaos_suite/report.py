"""Report of a chaos run: injected faults paired with the server's reasons, as a table."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chaos_suite.faults import DRAWN, Kind
from hafl_app.printable import markdown_text

# Up to this share of bad replies, the accuracy may be at most so many points below fault-free. It
# is the mean of the last rounds: from one round to the next it swings by more than the limit.
_BAD_LIMIT, _POINTS_LIMIT = 0.1, 1.0
LAST_ROUNDS = 5


@dataclass(frozen=True)
class KindCount:
    """Faults of one kind: the number injected and detected, and the first reason."""

    kind: Kind
    injected: int
    noticed: int
    reason: str


@dataclass(frozen=True)
class Tally:
    """Counts of a run's journal.

    Parameters
    ----------
    kinds
        By kind, in the order of `Kind`.
    honest_refused
        Training replies without a fault that did not count.
    rounds_lost
        Rounds that had to be repeated because too few replies counted.
    """

    kinds: tuple[KindCount, ...]
    honest_refused: int
    rounds_lost: tuple[int, ...]


def tally(journal: Sequence[Mapping[str, Any]]) -> Tally:
    """Pair every fault with the server's log of that client in that phase.

    A faulty reply is noticed if it was rejected, or logged as missing; a further one if it was
    ignored.

    Parameters
    ----------
    journal
        As `chaos_suite.grid.read_journal` returns it.
    """
    logged: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for line in journal:
        if line["event"] in {"refused", "turned away"}:
            logged[_key(line, line["event"])].append(line["reason"])
    injected: Counter[Kind] = Counter()
    reasons: dict[Kind, list[str]] = defaultdict(list)
    for line in journal:
        if line["event"] == "injected":
            kind = Kind(line["kind"])
            injected[kind] += 1
            left = logged[_key(line, "turned away" if kind.is_extra else "refused")]
            if left:
                reasons[kind].append(left.pop(0))
    counts = [
        KindCount(kind, injected[kind], len(reasons[kind]), next(iter(reasons[kind]), ""))
        for kind in (*DRAWN, Kind.STALE)
    ]
    honest = sum(len(left) for key, left in logged.items() if key[-1] == "refused")
    lost = sorted({line["round"] for line in journal if line["event"] == "lost"})
    return Tally(tuple(counts), honest, tuple(lost))


def _key(line: Mapping[str, Any], event: str) -> tuple[Any, ...]:
    return line["round"], line["attempt"], line["partition"], event


def problems(found: Mapping[str, Any]) -> list[str]:
    """Return the reasons why a chaos run failed, a line each.

    Parameters
    ----------
    found
        The content of ``chaos.json``.
    """
    reasons = [
        f"{count['kind']}: {count['injected'] - count['noticed']} of {count['injected']} unnoticed"
        for count in found["kinds"]
        if Kind(count["kind"]).is_malformed and count["noticed"] < count["injected"]
    ]
    reasons += [
        f"{attempt['kind']}: {attempt['reason'] or 'not rejected'}"
        for attempt in found["attempts"]
        if not attempt["detected"]
    ]
    if found["rounds_lost"]:
        reasons.append(f"rounds lost to bad replies: {list(found['rounds_lost'])}")
    if len(found["kills"]) < found["kills_wanted"]:
        reasons.append(f"{len(found['kills'])} of {found['kills_wanted']} kills came in time")
    points = found["points"]["mean of last rounds"]
    if found["bad"] <= _BAD_LIMIT and points < -_POINTS_LIMIT:
        reasons.append(f"test accuracy {points:+.2f} points beside fault-free")
    return reasons


def markdown(found: Mapping[str, Any]) -> str:
    """Return ``chaos.json`` as tables to read."""
    lines = [
        f"# {found['bad']:.0%} bad replies, {found['num_clients']} clients, "
        f"{found['num_rounds']} rounds, seed {found['seed']}",
        "",
        "| fault | injected | noticed | as |",
        "|---|---:|---:|---|",
        *(
            f"| {c['kind']} | {c['injected']} | {c['noticed']} | {markdown_text(c['reason'], 70)} |"
            for c in found["kinds"]
        ),
        *(
            f"| {a['kind']} | 1 | {int(a['detected'])} | {a['reason'][:70]} |"
            for a in found["attempts"]
        ),
        "",
        f"Honest replies rejected: {found['honest_refused']}. "
        f"Rounds lost: {len(found['rounds_lost'])}. "
        f"Kills and resumes: {len(found['kills'])} ({_phases(found['kills'])}).",
        "",
        f"| run | test accuracy, last round | mean of the last {LAST_ROUNDS} |",
        "|---|---:|---:|",
        *(
            f"| {name} | {s['final']:.1%} | {s['mean of last rounds']:.1%} |"
            for name, s in found["accuracy"].items()
        ),
        "",
        f"Faulty beside fault-free: {found['points']['final']:+.1f} points in the last round, "
        f"{found['points']['mean of last rounds']:+.1f} in the mean.",
        *(
            f"{name}: partitions {f['partitions']} flip always; {f['noticed']} of {f['injected']} "
            f"flips noticed, {f['honest_refused']} honest replies rejected."
            for name, f in found["flippers"].items()
        ),
        *(f"FAILED: {reason}" for reason in found["problems"]),
    ]
    return "\n".join(lines) + "\n"


def _phases(kills: Sequence[Mapping[str, Any]]) -> str:
    """Return the round of each kill, and the server's work at that time."""
    doing = {"training": "training", "scored": "writing the checkpoint"}
    return ", ".join(
        f"round {kill['round']} {doing.get(kill['event'], 'folding and scoring')}" for kill in kills
    )
