import json

import pytest

from hafl_app.server.quarantine import Quarantine


def after_refusals(count, *, after=3, rounds=2):
    """Partition 7 is refused in rounds 1 to `count`."""
    quarantine = Quarantine(after, rounds)
    for server_round in range(1, count + 1):
        quarantine.record(7, ok=False, server_round=server_round)
    return quarantine


def rounds_out(quarantine, partition_id=7):
    return [r for r in range(1, 12) if partition_id in quarantine.excluded(r)]


def test_fewer_rejections_than_the_limit_leave_no_node_out():
    assert rounds_out(after_refusals(2)) == []


def test_the_last_refusal_of_a_row_starts_a_rest_of_that_many_rounds():
    quarantine = after_refusals(3)
    # Also out of the round that it failed in, when that is repeated.
    assert {r for r in rounds_out(quarantine) if r >= 3} == {3, 4, 5}
    assert quarantine.excluded(6) == set()


def test_a_reply_that_counts_breaks_the_row():
    quarantine = after_refusals(2)
    quarantine.record(7, ok=True, server_round=3)
    quarantine.record(7, ok=False, server_round=4)
    quarantine.record(7, ok=False, server_round=5)
    assert quarantine.excluded(6) == set()


def test_one_more_refusal_after_the_rest_starts_the_next_at_once():
    quarantine = after_refusals(3)
    quarantine.record(7, ok=False, server_round=6)
    assert quarantine.excluded(7) == quarantine.excluded(8) == {7}
    assert quarantine.excluded(9) == set()


def test_success_after_the_rest_clears_the_record():
    quarantine = after_refusals(3)
    quarantine.record(7, ok=True, server_round=6)
    quarantine.record(7, ok=False, server_round=7)
    quarantine.record(7, ok=False, server_round=8)
    assert quarantine.excluded(9) == set()


def test_repeats_of_one_round_count_one_by_one():
    quarantine = Quarantine(after=2, rounds=1)
    quarantine.record(7, ok=False, server_round=4)
    quarantine.record(7, ok=False, server_round=4)
    assert quarantine.excluded(5) == {7}


def test_partitions_do_not_answer_for_each_other():
    quarantine = Quarantine(after=2, rounds=3)
    quarantine.record(7, ok=False, server_round=1)
    quarantine.record(8, ok=False, server_round=1)
    quarantine.record(8, ok=False, server_round=2)
    quarantine.record(7, ok=True, server_round=2)
    assert quarantine.excluded(3) == {8}


def test_after_zero_no_node_ever_rests():
    assert rounds_out(after_refusals(10, after=0)) == []


@pytest.mark.parametrize("refusals", [0, 2, 3, 4])
def test_a_quarantine_goes_on_from_its_json(refusals):
    original = after_refusals(refusals)
    values = json.loads(json.dumps(original.to_json()))
    restored = Quarantine.from_json(values, after=3, rounds=2)

    assert rounds_out(restored) == rounds_out(original)
    for quarantine in (original, restored):
        quarantine.record(7, ok=False, server_round=6)
    assert rounds_out(restored) == rounds_out(original)
    assert restored.to_json() == original.to_json()


def test_a_reply_that_counts_ends_a_rest():
    # A node that rests is asked all the same when no other node is there.
    quarantine = after_refusals(3)
    quarantine.record(7, ok=True, server_round=4)
    assert quarantine.excluded(5) == set()
