"""`hafl doctor`: what is wrong with this machine, and what a run would take on it."""

import contextlib
import io
from collections.abc import Sequence

from rich.text import Text

from hafl_app.cli import FAILED, REFUSED, run_script
from hafl_app.config.schema import Settings
from hafl_app.printable import printable
from hafl_app.run.environment import BROKEN, FINE, NOTE, Finding, findings
from hafl_app.tracking.as_text import Printer, duration

_STYLES = {FINE: "green", NOTE: "yellow", BROKEN: "red"}
_MARGIN = " " * 8
_LONGEST = 2000


def main(arguments: Sequence[str]) -> int:
    """Check the machine and, if settings are given, a run with them; return the exit code."""
    return run_script(lambda: _doctor(arguments))


def _doctor(arguments: Sequence[str]) -> int:
    settings = _settings(arguments) if arguments else None
    printer, broken = Printer(), False
    for finding in findings(settings):
        print_finding(printer, finding)
        broken = broken or finding.level == BROKEN
    if broken or settings is None:
        printer.line("broken: no run works before it is mended" if broken else "all that is needed")
        return FAILED if broken else 0
    return _estimate(printer, settings)


def _settings(arguments: Sequence[str]) -> Settings:
    from hafl_app.config.compose import SettingsError, compose  # noqa: PLC0415  Hydra takes a while
    from hafl_app.run.command_line import CommandLine  # noqa: PLC0415

    line = CommandLine.of(arguments)
    if line.flags:
        raise SettingsError(f"{line.flags[0]}: expected settings alone, as in experiment=demo")
    (job,) = line.jobs()
    return compose(job)


def _estimate(printer: Printer, settings: Settings) -> int:
    """Check the settings as a run would, then say what it takes."""
    from hafl_app.run.preflight import check  # noqa: PLC0415

    try:
        check(settings)
    except ValueError as error:
        print_finding(printer, Finding("Settings", BROKEN, str(error)))
        return REFUSED
    print_finding(printer, Finding("Settings", FINE, "go together, with the model and the data"))
    from hafl_app.data.combinations import ON_DEVICE  # noqa: PLC0415

    if settings.dataset.source == ON_DEVICE:
        line = "clients, memory and minutes are those of the devices, which are not here"
        print_finding(printer, Finding("Run", NOTE, line))
        return 0
    from hafl_app.engines.estimate import ERROR, advice, estimate  # noqa: PLC0415  imports torch

    with contextlib.redirect_stdout(io.StringIO()):
        found = estimate(settings)
    clients = f"{found.clients} clients, {found.at_once} at a time ({settings.engine})"
    print_finding(printer, Finding("Clients", FINE, clients))
    enough = found.needed_mb <= found.usable_mb
    memory = (
        f"about {found.needed_mb / 1000:.1f} GB of {found.usable_mb / 1000:.1f} GB that are free"
    )
    print_finding(printer, Finding("Memory", FINE if enough else NOTE, memory))
    low, high = duration(found.total_s / ERROR), duration(found.total_s * ERROR)
    stages = ", ".join(
        f"{name} {duration(seconds)}" for name, seconds in _named(found.seconds) if seconds >= 0.5
    )
    time = f"about {duration(found.total_s)}, from {low} to {high}, by steps timed now: {stages}"
    print_finding(printer, Finding("Time", FINE, time))
    for line in advice(settings, found):
        print_finding(printer, Finding("Change", NOTE, line))
    return 0


def _named(seconds: dict[str, float]) -> list[tuple[str, float]]:
    from hafl_app.tracking.closing import STAGES  # noqa: PLC0415

    return [(STAGES.get(stage, stage), value) for stage, value in seconds.items()]


def print_finding(printer: Printer, finding: Finding) -> None:
    """Print level, name and text of a finding; what changes it on a line of its own."""
    word = Text(f"{finding.level:<6}", style=_STYLES[finding.level])
    text = f"{finding.name}: {printable(finding.text, _LONGEST)}"
    printer.marked(word, text, indent=_MARGIN)
    if finding.remedy:
        printer.path(f"{_MARGIN}-> {printable(finding.remedy, _LONGEST)}")
