"""Run the project's programs in this process: a process of its own takes seconds to import."""

import contextlib
import io
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

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
    path, threads = list(sys.path), torch.get_num_threads()
    with mock.patch.object(sys, "argv", list(command)), mock.patch.dict(os.environ):
        try:
            yield
        finally:
            sys.path[:] = path
            torch.set_num_threads(threads)
