"""Command-line programs: exit codes, and errors in one line."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from hafl_app.printable import printable

FAILED = 1
REFUSED = 2
INTERRUPTED = 130
_INTERRUPTING = (signal.SIGTERM, signal.SIGHUP)


def run_script(job: Callable[[], int], interrupted: str | Callable[[], str] = "interrupted") -> int:
    """Run a program and return its exit code; a user's mistake is one line, never a traceback.

    Parameters
    ----------
    job
        Returns the exit code if nothing is raised. A `ValueError` is rejected input (2), a
        `RuntimeError` or `OSError` is a failure (1), and Ctrl-C, SIGTERM or a closed
        terminal an interruption (130).
    interrupted
        Printed after an interruption, or called for what is printed.
    """
    # What is ignored stays so: under nohup a closed terminal ends nothing.
    numbers = [n for n in _INTERRUPTING if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return job()
    except ValueError as error:
        print(f"error: {printable(error, 2000)}", file=sys.stderr)  # noqa: T201
        return REFUSED
    except (RuntimeError, OSError) as error:
        print(f"error: {type(error).__name__}: {printable(error, 2000)}", file=sys.stderr)  # noqa: T201
        return FAILED
    except KeyboardInterrupt:
        line = interrupted if isinstance(interrupted, str) else interrupted()
        print(line, file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_program(
    description: str | None,
    job: Callable[[list[str]], int],
    interrupted: str | Callable[[], str] = "interrupted",
) -> int:
    """Run a program with its arguments as they were typed, see `run_script`.

    Parameters
    ----------
    description
        Printed by ``--help``.
    """
    arguments = sys.argv[1:]
    if arguments == ["help"] or {"-h", "--help"} & set(arguments):
        print(description)  # noqa: T201
        return 0
    return run_script(lambda: job(arguments), interrupted)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt
