"""Fixtures of rounds' records."""

import math
from dataclasses import replace

import pytest

from hafl_app.tracking.base import RoundRecord

ROUND = RoundRecord(
    server_round=1,
    seconds=8.4,
    train_loss=0.75,
    bytes_down=12_340_000,
    bytes_up=4_100_000,
    replies=3,
    failures=0,
    metrics={"validation/accuracy": 0.512, "test/accuracy": 0.487, "test/macro-f1": 0.431},
)
UNTRAINED = {"seconds": 2.0, "train_loss": math.nan, "bytes_down": 0, "bytes_up": 0}


@pytest.fixture
def round_record():
    """Make a round; a keyword changes a field."""
    return lambda **changes: replace(ROUND, **changes)


@pytest.fixture
def untrained(round_record):
    """Round 0, before training."""
    metrics = {"validation/accuracy": 0.25, "test/accuracy": 0.24}
    return round_record(server_round=0, metrics=metrics, **UNTRAINED)
