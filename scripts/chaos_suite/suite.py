"""A chaos run: a federation under faults and kills beside one without, and what was noticed."""

import json
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from chaos_suite.command import ChaosCommand
from chaos_suite.faults import Kind, NoFaults, RandomFaults, SignFlippers
from chaos_suite.grid import read_journal
from chaos_suite.report import LAST_ROUNDS, markdown, problems, tally
from chaos_suite.runs import Part, run_part, run_with_kills
from chaos_suite.strangers import try_profiles, try_run_configs
from hafl_app.config.compose import SettingsError, compose
from hafl_app.experiments.command import output_folder
from hafl_app.experiments.compare import hardware
from hafl_app.reports.curve import read_curve
from hafl_app.run import preflight
from hafl_app.run.run_folder import check_new

Say = Callable[[str], None]


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
