"""Run the project's programs in this process: a process of its own takes seconds to import."""

import contextlib
import io
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """Result of a program, as `subprocess.run` would have returned it."""

    returncode: int
    stdout: str
    stderr: str


def run_program(program: str, *arguments: object) -> Done:
    """Run a program as ``__main__`` until it ends.

    Parameters
    ----------
    program
        Path from the repository's root, or name of a module.
    arguments
        Of its command line.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        _own_process(program, *map(str, arguments)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    return Done(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _own_process(*command: str) -> Iterator[None]:
    """Give a program its command line, and undo what it changes in this process."""
    path, threads, logging_before = list(sys.path), torch.get_num_threads(), _logging_state()
    with mock.patch.object(sys, "argv", list(command)), mock.patch.dict(os.environ):
        try:
            yield
        finally:
            sys.path[:] = path
            torch.set_num_threads(threads)
            GlobalHydra.instance().clear()
            for logger, state in logging_before.items():
                logger.__dict__.update(state)
            logging.root.setLevel(logging.root.level)  # forgets which levels were enabled


def _logging_state() -> dict[logging.Logger, dict[str, object]]:
    """Return what Hydra and a run change in every logger."""
    known = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(one for one in known if isinstance(one, logging.Logger))]
    kept = ("level", "propagate", "disabled")
    return {
        one: {**{name: getattr(one, name) for name in kept}, "handlers": list(one.handlers)}
        for one in loggers
    }
