import pytest
import torch
from benchmarks import precision
from benchmarks.precision import BF16, FP32, WAYS, check_rounding, clients, compare
from benchmarks.timing import DisagreementError
from benchmarks.training import Case

CASE = Case(3, 2)


@pytest.fixture(scope="module")
def ways():
    return clients(None, 1, steps=2, batch_size=4)


def test_every_way_is_timed_after_the_rounding_is_found_small(ways):
    timings = compare(ways, CASE, 1)

    assert list(timings) == list(WAYS)
    assert all(timing.median > 0 for timing in timings.values())
    weights = {way: client.model.base.embeddings.word_embeddings for way, client in ways.items()}
    assert weights[BF16].weight.dtype == torch.bfloat16
    assert weights[FP32].weight.dtype == torch.float32
    rates = {client.model.base.config.hidden_dropout_prob for client in ways.values()}
    assert rates == {0.0, 0.1}


def test_a_loss_out_of_bounds_is_never_timed(ways, monkeypatch):
    assert check_rounding(ways[FP32], ways[BF16], CASE)[0] > 0
    monkeypatch.setattr(precision, "LOSS_BOUND", 0.0)

    with pytest.raises(DisagreementError, match=r"in bf16 the loss differ"):
        compare(ways, CASE, 1)


def test_other_weights_are_never_timed(ways):
    other = clients(None, 1, steps=2, batch_size=4)[BF16]
    with torch.no_grad():
        other.model.layers["encoder.layer.0.output.dense"].base_layer.weight *= 1.5

    with pytest.raises(DisagreementError):
        check_rounding(ways[FP32], other, CASE)
