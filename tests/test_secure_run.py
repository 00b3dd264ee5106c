"""Runs with secure aggregation, from the settings to the files."""

import pytest
from running import records, run_tiny, tampering
from safetensors.torch import load_file

from hafl_app.server.coordinator import Coordinator
from hafl_app.server.rounds import RoundFailedError
from hafl_app.wire.faults import Fault, error_reply
from hafl_app.wire.records import METRICS
from hafl_app.wire.secure_sum import SECURE, VECTOR

pytestmark = pytest.mark.slow  # whole federations

MIXED = ("ranks.tiers=[{rank: 2, share: 2}, {rank: 4, share: 3}]", "lora.max_rank=4")
EVEN = "ranks.tiers=[{rank: 2, share: 1}, {rank: 4, share: 1}]"  # three clients of each rank
SECURE_SUM = ("strategy=zero_padding", "privacy=secure_aggregation", *MIXED)
PLAIN = ("strategy=zero_padding", "federation.max_norm_ratio=null", *MIXED)


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


# Where clients weigh or choose, Adam's second round makes more of the first one's rounding.
@pytest.mark.parametrize(
    ("method", "bound"),
    [
        (("strategy=zero_padding",), 1e-6),
        (("strategy=hetlora", "strategy.pruning=false", "federation.num_clients=6", EVEN), 1e-5),
        (("strategy=lora_a2", "client.lora_B_lr_ratio=1"), 1e-5),
    ],
    ids=["zero_padding", "hetlora", "lora_a2"],
)
def test_ends_where_a_run_without_masks_ends(tmp_path, method, bound):
    run_tiny(tmp_path / "plain", *PLAIN, *method)
    seen = []

    def spy(request, reply):
        seen.append((request.content, reply.content))
        return reply

    summary = run_tiny(tmp_path / "secure", *SECURE_SUM, *method, app=tampering(spy))

    plain, secure = adapter(tmp_path / "plain"), adapter(tmp_path / "secure")
    for name, tensor in plain.items():
        assert (tensor - secure[name]).abs().max() < bound
    assert summary["status"] == "finished"
    assert len(seen) == 2 * (6 if EVEN in method else 5)
    for request, reply in seen:
        assert SECURE in request
        assert set(reply) == {VECTOR, METRICS}


def test_a_node_that_fails_is_left_out_and_too_many_end_the_run(tmp_path):
    failing = {1}

    def fail(request, reply):
        if request.metadata.dst_node_id in failing:
            return error_reply(request, Fault.LOSS_NOT_FINITE, "no loss")
        return reply

    ranks = ("lora.max_rank=4", "ranks=homogeneous", "federation.max_retries=0")
    run_tiny(tmp_path / "one", *SECURE_SUM, *ranks, app=tampering(fail))
    rounds = records(tmp_path / "one", "round")
    assert len(rounds) == 3
    failing |= {2, 3}
    line = "round 1: 2 of 5 clients have uploaded, the secure sum needs 3"
    with pytest.raises(RoundFailedError, match=line):
        run_tiny(tmp_path / "many", *SECURE_SUM, *ranks, app=tampering(fail))


def test_a_rank_of_two_clients_ends_the_run_by_name(tmp_path):
    tiers = "ranks.tiers=[{rank: 2, share: 3}, {rank: 4, share: 2}]"
    with pytest.raises(RoundFailedError, match="would be summed over 2 clients, expected at least"):
        run_tiny(tmp_path / "out", *SECURE_SUM, tiers)


def test_a_node_uploads_nothing_without_a_mask_where_masks_are_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(Coordinator, "_agree", lambda self, selected, *_: selected)
    line = "secure_aggregation=true, and the request says otherwise"
    with pytest.raises(RoundFailedError, match=line):
        run_tiny(tmp_path / "out", *SECURE_SUM, "federation.max_retries=0")
