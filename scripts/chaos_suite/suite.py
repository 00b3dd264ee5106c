"""A chaos run: a federation under faults and kills beside one without, and what was noticed."""

import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from chaos_suite.faults import Kind, NoFaults, RandomFaults, SignFlippers
from chaos_suite.grid import read_journal
from chaos_suite.report import LAST_ROUNDS, markdown, problems, tally
from chaos_suite.runs import Part, run_part, run_with_kills
from chaos_suite.strangers import try_profiles, try_run_configs
from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments.command import Reader, split_arguments
from hafl_app.experiments.compare import hardware, output_folder
from hafl_app.experiments.results import read_curve
from hafl_app.run import preflight
from hafl_app.run.run_folder import check_new

Say = Callable[[str], None]
_DECIDED = {
    "engine",
    "resume",
    "federation.robust",
    "federation.alone_clients_per_rank",
    "federation.test_every",
}


@dataclass(frozen=True)
class ChaosCommand:
    """A checked command line.

    Parameters
    ----------
    overrides
        Hydra overrides that hold for every run.
    seed
        Of the runs, the faults and the kills.
    bad
        Share of faulty replies, in [0, 1].
    kills
        Kills of the server of the faulty run, at least 0.
    flippers
        Share of clients that always flip signs, in [0, 1], in two runs of their own; 0: no such
        runs.
    robust
        Value of ``federation.robust`` in the second of these.
    experiment
        File of ``conf/experiment``.
    output_dir
        Where to write.
    """

    overrides: tuple[str, ...] = ()
    seed: int = 0
    bad: float = 0.1
    kills: int = 3
    flippers: float = 0.2
    robust: str = "median"
    experiment: str = "chaos"
    output_dir: Path | None = None


def parse_command(arguments: Sequence[str]) -> ChaosCommand:
    """Read ``key=value`` arguments; keys that are not the chaos run's own are Hydra overrides.

    Raises
    ------
    SettingsError
        In one line, naming the argument and what was expected.
    """
    own, overrides = split_arguments(arguments, _READERS, "bad=0.1")
    for override in overrides:
        if override.partition("=")[0] in _DECIDED:
            raise SettingsError(f"{override}: a chaos run decides that itself")
    return ChaosCommand(overrides, **own)


def _whole(key: str, text: str) -> int:
    if not text.isdecimal():
        raise SettingsError(f"{key}={text}: expected a whole number, at least 0")
    return int(text)


def _share(key: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise SettingsError(f"{key}={text}: expected a number from 0 to 1")
    return share


_READERS: Mapping[str, Reader] = {
    "seed": _whole,
    "bad": _share,
    "kills": _whole,
    "flippers": _share,
    "robust": lambda _, text: text,
    "experiment": lambda _, text: text,
    "output_dir": lambda _, text: Path(text).expanduser().absolute(),
}


def chaos(command: ChaosCommand, command_line: str, say: Say) -> list[str]:
    """Run the federations, write ``chaos.json`` and ``chaos.md``, and return what went wrong.

    Raises
    ------
    hafl_app.config.compose.SettingsError, ValueError
        In one line, before anything runs.
    RuntimeError
        If a run failed.
    """
    folder = output_folder(command.output_dir, "chaos")
    parts = _parts(command, folder)
    for part in parts.values():
        check_new(part.folder)
        preflight.check(compose(part.overrides))
    folder.mkdir(parents=True, exist_ok=True)
    say(f"Output folder: {folder}")
    attempts = [*try_profiles(parts["fault-free"].overrides), *try_run_configs()]
    say(f"{sum(a.detected for a in attempts)} of {len(attempts)} hostile nodes and runs rejected")
    scores: dict[str, dict[str, float]] = {}
    kills: list[dict[str, Any]] = []
    for name, part in parts.items():
        if part.kill_rounds:
            seconds = _round_seconds(parts["fault-free"].folder)
            kills = run_with_kills(replace(part, round_seconds=seconds))
        else:
            run_part(part)
        scores[name] = _scores(part.folder)
        say(f"{name}: test accuracy {scores[name]['final']:.1%}")
    settings = compose(parts["faulty"].overrides).federation
    found = {
        "command": command_line,
        "seed": command.seed,
        "bad": command.bad,
        "num_clients": settings.num_clients,
        "num_rounds": settings.num_rounds,
        **asdict(tally(read_journal(parts["faulty"].folder))),
        "attempts": [asdict(attempt) for attempt in attempts],
        "kills_wanted": command.kills,
        "kills": kills,
        "accuracy": scores,
        "points": {
            name: 100 * (scores["faulty"][name] - scores["fault-free"][name])
            for name in ("final", "mean of last rounds")
        },
        "flippers": _flippers(parts),
        "hardware": hardware(),
    }
    found["problems"] = problems(found)
    (folder / "chaos.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "chaos.md").write_text(markdown(found))
    say(markdown(found))
    say(f"Written: chaos.json and chaos.md in {folder}")
    return list(found["problems"])


def _parts(command: ChaosCommand, folder: Path) -> dict[str, Part]:
    """Return the federations by name, the fault-free one first."""
    common = (f"experiment={command.experiment}", *command.overrides, f"seed={command.seed}")
    federation = compose(common).federation
    clients, seed = federation.num_clients, command.seed
    rounds = range(1, federation.num_rounds)  # a kill in the last might come too late
    if command.kills > len(rounds):
        raise SettingsError(
            f"kills={command.kills}: at most {len(rounds)} in {federation.num_rounds} rounds"
        )
    kill_rounds = tuple(sorted(random.Random(f"{seed}/chaos/kills").sample(rounds, command.kills)))
    parts = {
        "fault-free": Part(folder / "fault-free", common, NoFaults()),
        "faulty": Part(
            folder / "faulty",
            common,
            RandomFaults(seed, command.bad, clients),
            kill_rounds,
            seed,
        ),
    }
    if command.flippers:
        flippers = SignFlippers(seed, command.flippers, clients)
        for rule in ("none", command.robust):
            name = "flippers" if rule == "none" else f"flippers, {rule}"
            overrides = (*common, f"federation.robust={rule}")
            parts[name] = Part(folder / name.replace(", ", "-"), overrides, flippers)
    return parts


def _round_seconds(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(float(line["seconds"]) for line in lines if line["kind"] == "round")


def _scores(folder: Path) -> dict[str, float]:
    test = read_curve(folder).test
    return {
        "first": test[0],
        "final": test[-1],
        "mean of last rounds": statistics.fmean(test[-LAST_ROUNDS:]),
    }


def _flippers(parts: Mapping[str, Part]) -> dict[str, Any]:
    """Return the flippers of every run that has some, and their detected replies."""
    found = {}
    for name, part in parts.items():
        if isinstance(part.schedule, SignFlippers):
            counts = tally(read_journal(part.folder))
            flipped = next(k for k in counts.kinds if k.kind is Kind.SIGN_FLIPPED)
            found[name] = {
                "partitions": part.schedule.partitions,
                "injected": flipped.injected,
                "noticed": flipped.noticed,
                "honest_refused": counts.honest_refused,
            }
    return found
