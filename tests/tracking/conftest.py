from dataclasses import replace

import pytest
from round_records import round_record, untrained  # noqa: F401  fixtures

from hafl_app.tracking.base import ClientRecord, ClientRow

CLIENT = ClientRecord(
    server_round=1,
    partition_id=7,
    node_id=9_007_199_254_740_993,  # 2^53 + 1: a float would lose it
    rank=4,
    components_trained=3,
    num_examples=120,
    loss=0.8,
    seconds=2.5,
    peak_memory_mb=310.0,
    bytes_down=360_000,
    bytes_up=120_000,
)


@pytest.fixture
def client_record():
    """Make a client's round; a keyword changes a field."""
    return lambda **changes: replace(CLIENT, **changes)


@pytest.fixture
def client_rows():
    """Three clients of unequal rank and size."""
    return [
        ClientRow(
            partition_id=0,
            node_id=11,
            rank=2,
            examples=1200,
            device="cpu",
            bytes_down=400_000,
            bytes_up=100_000,
        ),
        ClientRow(
            partition_id=1,
            node_id=12,
            rank=4,
            examples=35,
            device="cuda:0",
            bytes_down=400_000,
            bytes_up=200_000,
        ),
        ClientRow(
            partition_id=2,
            node_id=13,
            rank=16,
            examples=410,
            device="cuda:1",
            bytes_down=1_600_000,
            bytes_up=1_600_000,
        ),
    ]
