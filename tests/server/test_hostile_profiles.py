"""Every field of a node's profile with values that no honest node sends."""

import json
import logging
import time

import pytest
from fake_grid import FakeGrid

from hafl_app.engines.in_process import server_identity
from hafl_app.printable import printable
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.wire.node_profile import NodeProfile

HONEST = NodeProfile(0, 3, 4, 120, "cpu")
OTHER = NodeProfile(
    1,
    3,
    8,
    250,
    "cuda",
    rank_pattern={"output.dense": 2},
    own_data=True,
    label_names=("food", "music"),
    device_name="NVIDIA L4",
    memory_total_mb=23_034,
    memory_free_mb=21_500,
    torch_version="2.13.0",
    cuda_version="12.8",
    bandwidth_kbps=900,
)
MODULES = [f"encoder.layer.{i}.attention.output.dense" for i in range(150)]
NASTY = {
    "huge": 2**63 - 1,
    "negative": -1,
    "most negative": -(2**63),
    "not a number": float("nan"),
    "infinite": float("inf"),
    "fraction": 1.5,
    "truth value": True,
    "text": "12",
    "empty": "",
    "long text": "x" * 1_000_000,
    "screen control": "\x1b[2J\x1b]0;pwned\x07",
    "forged line": "a\nINFO hafl_app: round 9/9  val 99.9%",
    "right to left": "a\u202eb",
    "markup": "[/x][bold red]a[link=http://x]<script>alert(1)</script>",
    "bytes": b"\x00\xff" * 100,
    "numbers": [1, 2, 3],
    "texts": ["a\x1b[2J", "b"],
    "many texts": [f"class {i}" for i in range(20_000)],
    "json": json.dumps({"a": 10**400, "(a+)+$": 2}),
    "deep json": "[" * 50_000,
}
FIELDS = sorted(OTHER.to_record())


def taken_in(record):
    """Return the directory after a hostile and an honest node have answered, and the seconds."""
    grid = FakeGrid(n11=HONEST, n12=record)
    directory = NodeDirectory(3600.0, start_timeout_s=0.01)
    started = time.perf_counter()
    with server_identity():
        present = directory.wait_for_all(grid)
    return directory, present, time.perf_counter() - started


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_every_field_is_tried():
    assert len(FIELDS) == 15
    _, present, _ = taken_in(OTHER.to_record())
    assert [profile.node_id for profile in present] == [11, 12]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", NASTY.values(), ids=NASTY)
def test_the_node_is_left_out_or_the_value_is_harmless(field, value, caplog):
    record = OTHER.to_record()
    record[field] = value

    with caplog.at_level(logging.INFO):
        directory, present, seconds = taken_in(record)

    assert seconds < 2  # of both nodes; an honest pair takes milliseconds
    assert 11 in {profile.node_id for profile in present}  # nobody else pays for it
    for line in caplog.messages:
        assert line == printable(line, 2000)
    if 12 in directory.refusals:
        assert directory.refusals[12] == printable(directory.refusals[12], 500)
        return
    (profile,) = [p for p in present if p.node_id == 12]
    check_harmless(profile, field)


@pytest.mark.parametrize("num_partitions", [8, 0, 10**18, "many", 1.5])
def test_a_node_does_not_say_that_it_is_unnumbered(num_partitions):
    record = OTHER.to_record()
    record["partition-id"], record["num-partitions"] = -1, num_partitions

    directory, present, _ = taken_in(record)

    assert "partition_id is -1, expected a whole number" in directory.refusals[12]
    assert [profile.node_id for profile in present] == [11]


def check_harmless(profile, field):
    """A value that was taken in is as an honest node's: in range, short, printable."""
    numbers = (profile.num_examples, profile.memory_total_mb, profile.memory_free_mb)
    assert all(0 <= number <= 10**12 for number in (*numbers, profile.bandwidth_kbps))
    assert all(1 <= rank <= 2**16 for rank in profile.ranks)
    assert 0 <= profile.partition_id < profile.num_partitions <= 10**9
    texts = (
        *(profile.device, profile.device_name, profile.precision),
        *(profile.torch_version, profile.cuda_version),
    )
    assert all(len(text) <= 100 and text.isprintable() for text in texts), field
    assert len(profile.label_names) <= 10_000
    assert profile.device_line == printable(profile.device_line)


@pytest.mark.parametrize(
    "patterns",
    [
        {f"layer.{i}": 2 for i in range(20_000)},
        {f"layer.{i}": 2 for i in range(257)},
        {f".*a{i}.*b.*c": 2 for i in range(11)},
        {".*" * 4: 2},
        {"x" * 81: 2},
        {"(a|a)*b": 2},
    ],
    ids=["20,000", "257", "33 wildcards", "4 repetitions", "long", "group"],
)
def test_patterns_that_would_cost_the_server_time_are_refused_at_once(patterns):
    record = OTHER.to_record()
    record["rank-pattern"] = json.dumps(patterns)

    directory, present, seconds = taken_in(record)

    assert "pattern" in directory.refusals[12]
    assert [profile.node_id for profile in present] == [11]
    assert seconds < 0.5


def test_the_costliest_patterns_that_are_taken_in_cost_little():
    patterns = {f".*.*.*{i}q": 2 for i in range(10)}
    patterns |= {rf"layer.\d+.x{i}.\d+.\d+": 2 for i in range(11)}
    patterns |= {f"layer.x{i}": 2 for i in range(235)}
    record = OTHER.to_record()
    record["rank-pattern"] = json.dumps(patterns)
    _, present, _ = taken_in(record)
    (profile,) = [p for p in present if p.node_id == 12]

    started = time.process_time()
    ranks = [profile.rank_of(module) for module in MODULES]

    assert ranks == [8] * len(MODULES)
    assert time.process_time() - started < 2  # 0.04 s on an idle core; 1.1 s with 256 of the first
