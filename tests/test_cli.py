"""Exit codes and last lines of a program."""

import os
import signal

import pytest

from hafl_app.cli import INTERRUPTED, run_script


def ended_by(number):
    def job():
        os.kill(os.getpid(), number)
        signal.pause()
        return 0

    return run_script(job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_and_a_closed_terminal_are_interruptions(number, capsys):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup the tests ignore one of them
    try:
        assert ended_by(number) == INTERRUPTED
        assert capsys.readouterr().err == "interrupted\n"
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_ends_nothing_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def job():
            os.kill(os.getpid(), signal.SIGHUP)
            return 7

        assert run_script(job) == 7
    finally:
        signal.signal(signal.SIGHUP, before)
