import numpy as np
import pytest
import torch
from benchmarks import training
from benchmarks.timing import DisagreementError
from benchmarks.training import (
    OURS,
    TRAINER,
    TRAINER_PADDED,
    WAYS,
    Case,
    banking_lengths,
    check_agreement,
    make_client,
    measure,
    memory_growth_mb,
    plain_peft,
)

from hafl_app.training.settings import TrainOptions

pytestmark = pytest.mark.slow

CASES = [Case(3, 3), Case(5, 2)]


@pytest.fixture(scope="module")
def client():
    return make_client(None, 2, TrainOptions(batch_size=3))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_way_is_timed_after_all_have_the_same_gradients(client, case):
    timings = measure(client, case, WAYS, 1)

    assert list(timings) == [OURS, TRAINER, TRAINER_PADDED]
    assert all(len(timing.seconds) == 1 for timing in timings.values())
    assert all(timing.median > 0 for timing in timings.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_way_with_other_factors_is_never_timed(client, case, factor, monkeypatch):
    def other(*arguments):
        model = plain_peft(*arguments)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if f"layer.1.output.dense.{factor}" in name:
                    parameter[0] *= 1.01
        return model

    monkeypatch.setattr(training, "plain_peft", other)

    with pytest.raises(DisagreementError, match=r"differ by .* of the norm"):
        check_agreement(client, case)


def test_padding_that_is_seen_is_never_timed(client, monkeypatch):
    right = training.padded

    def blind(rows, length=None):
        batch = right(rows, length)
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

    monkeypatch.setattr(training, "padded", blind)

    with pytest.raises(DisagreementError):
        check_agreement(client, CASES[0])


def test_without_accelerate_only_our_way_is_timed(client, monkeypatch):
    monkeypatch.setattr(training, "is_installed", lambda: False)

    assert list(measure(client, CASES[0], WAYS, 1)) == [OURS]


def test_plain_peft_trains_what_the_plan_trains(client):
    model = plain_peft(client, Case(5, 2))

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    assert all(p.shape[0] == 2 for name, p in trained.items() if "lora_A" in name)
    assert all(p.shape[1] == 2 for name, p in trained.items() if "lora_B" in name)
    assert {name for name in trained if "lora_" not in name} == {"head.weight", "head.bias"}


def test_lengths_are_those_of_banking77():
    lengths = banking_lengths(4000)

    assert np.median(lengths) == 13
    assert lengths.mean() == pytest.approx(15, abs=0.5)
    assert lengths.max() == 48


def test_memory_grows_while_training(client):
    before, peak = memory_growth_mb(client, CASES[0], OURS)

    assert 100 < before <= peak * 1.01
