"""The ways to compute a batch that `scripts/bench_packing.py` times: all have its gradients."""

import numpy as np
import pytest
import torch
from benchmarks import packing
from benchmarks.timing import DisagreementError
from causal_factories import CAUSAL, random_pairs
from training_factories import plan_for, random_adapter

PAIRS = random_pairs(24)
ROWS = np.array([3, 8, 1, 20])


@pytest.fixture(scope="module")
def model():
    model = CAUSAL.build()
    adapter = random_adapter(model, 3)
    model.load(adapter, plan_for(adapter))
    return model.train()


def test_all_ways_have_the_same_gradients(model):
    timings = packing.measure(model, PAIRS, ROWS, "fp32", 1)
    assert timings.keys() == packing.WAYS.keys()
    assert model.base.config._attn_implementation == "sdpa"


def test_rows_that_read_each_other_are_found_out(model, monkeypatch):
    def leaking(model, parts):
        length = sum(part.input_ids.shape[1] for part in parts[1:])
        mask = torch.ones(length, length).tril().bool()[None, None]
        yield packing._packed(model, parts[1:], mask)

    monkeypatch.setattr(packing, "WAYS", {**packing.WAYS, "leaking": leaking})
    with pytest.raises(DisagreementError, match="leaking: the gradients differ"):
        packing.measure(model, PAIRS, ROWS, "fp32", 1)


def test_the_batches_are_whole_and_their_padding_is_counted(model):
    batches, ours, shuffled = packing.batches_of(PAIRS, 4, 3, seed=0)
    lengths = np.diff(PAIRS.offsets)
    assert [len(rows) for rows in batches] == [4, 4, 4]
    sums = [lengths[rows].sum() for rows in batches]
    assert sums == sorted(sums)
    assert 0 <= ours < shuffled
    [whole] = packing.batches_of(PAIRS, 24, 1, seed=0)[0]
    assert packing.padding(PAIRS, [whole]) == pytest.approx(24 * lengths.max() / lengths.sum() - 1)
