import pytest
import torch
from benchmarks import aggregation
from benchmarks.aggregation import make_case, measure
from benchmarks.timing import DisagreementError

from hafl_app.lowrank.factors import LoraFactors


def test_every_way_is_timed():
    timings = measure(make_case(48, (8, 4, 2)), 2, slow_peers=True)

    assert list(timings) == ["ours", "plain QR", "dense SVD", "PEFT merge", "PEFT merge, thin"]
    assert all(len(timing.seconds) == 2 for timing in timings.values())


@pytest.mark.parametrize(
    ("way", "slow_peers"),
    [("ours", True), ("ours", False), ("plain_qr", False), ("dense_svd", True)],
)
def test_a_wrong_result_is_never_timed(way, slow_peers, monkeypatch):
    right = getattr(aggregation, way)

    def wrong(case):
        factors = right(case)
        return LoraFactors(factors.lora_A, factors.lora_B * 1.01)

    monkeypatch.setattr(aggregation, way, wrong)

    with pytest.raises(DisagreementError, match="leaves an error"):
        measure(make_case(48, (8, 4, 2)), 1, slow_peers=slow_peers)


def test_clients_weigh_differently():
    case = make_case(48, (8, 4, 2))

    assert sum(case.weights) == pytest.approx(1)
    assert len(set(case.weights)) == 3
    assert [u.rank for u in case.updates] == [8, 4, 2]
    assert all(torch.isfinite(u.lora_B).all() for u in case.updates)
