"""Lines of a log: one a record, and none that a message forges."""

import io
import logging
import sys

import pytest

from hafl_app.client.warm_worker.worker import _CollectedLog
from hafl_app.run.logs import LogFormatter, output_to

FORGED = "reviews\nERROR hafl_app.run: forged\x1b[2J\r\u2028WARNING hafl_app: too"
ONE_LINE = (
    "WARNING hafl_app.data: no rows in reviews ERROR hafl_app.run: forged\\x1b[2J "
    "WARNING hafl_app: too"
)


@pytest.fixture
def logger():
    logger = logging.getLogger("hafl_app.data")
    yield logger
    logger.setLevel(logging.NOTSET)


def test_a_message_is_one_line_in_a_runs_log(logger):
    log = io.StringIO()
    with output_to(log):
        logger.warning("no rows in %s", FORGED)

    assert log.getvalue() == f"{ONE_LINE}\n"


def test_a_message_is_one_line_in_a_workers_log(logger):
    with _CollectedLog() as log:
        logger.warning("no rows in %s", FORGED)

    assert log.lines == [ONE_LINE]


def test_a_message_of_megabytes_is_cut(logger):
    log = io.StringIO()
    with output_to(log):
        logger.warning("%s", "x" * 3_000_000)

    assert len(log.getvalue()) < 5000


def test_a_traceback_is_indented_and_whole():
    try:
        int(FORGED)
    except ValueError:
        record = logging.LogRecord(
            "hafl_app.data", logging.ERROR, "file", 1, "it failed", None, sys.exc_info()
        )

    first, *others = LogFormatter().format(record).split("\n")

    assert first == "ERROR hafl_app.data: it failed"
    assert others[0] == "    Traceback (most recent call last):"
    assert others[-1].startswith("    ValueError: invalid literal for int()")
    assert all(line.startswith("    ") and line.isprintable() for line in others)


def test_a_reason_of_several_lines_forges_none_in_a_traceback():
    error = ValueError(FORGED)
    record = logging.LogRecord(
        "hafl_app.data", logging.ERROR, "file", 1, "it failed", None, (ValueError, error, None)
    )

    lines = LogFormatter().format(record).split("\n")

    assert lines == [
        "ERROR hafl_app.data: it failed",
        "    ValueError: reviews",
        "    ERROR hafl_app.run: forged\\x1b[2J",
        "    ",
        "    WARNING hafl_app: too",
    ]


def test_what_another_handler_shows_is_not_changed(logger, caplog):
    with output_to(io.StringIO()):
        logger.warning("no rows in %s", FORGED)

    assert caplog.records[0].getMessage() == f"no rows in {FORGED}"
