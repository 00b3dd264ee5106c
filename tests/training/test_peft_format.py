import pytest
import torch

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.training.peft_format import factor_keys, factor_tensors, peft_config, without_padding
from hafl_app.training.settings import BaseSpec


@pytest.fixture
def adapter() -> Adapter:
    ranks = {"a.query": 2, "a.output": 4, "b.query": 3}
    return Adapter({n: LoraFactors(torch.randn(r, 5), torch.randn(7, r)) for n, r in ranks.items()})


def test_every_module_has_the_largest_rank_and_no_pattern(adapter):
    config = peft_config(adapter, BaseSpec("some/base"), None)

    assert config.r == config.lora_alpha == 4
    assert not config.rank_pattern
    assert not config.alpha_pattern
    for name in adapter.modules:
        lora_A, lora_B = (factor_tensors(adapter)[key] for key in factor_keys(name))
        assert (lora_A.shape, lora_B.shape) == ((4, 5), (7, 4))


def test_padding_comes_off_again(adapter):
    factors = adapter.modules["a.query"]

    back = without_padding(factors.padded(4), 2)

    assert torch.equal(back.lora_A, factors.lora_A)
    assert torch.equal(back.lora_B, factors.lora_B)


@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_what_was_trained_in_the_padding_stays(adapter, trained):
    padded = adapter.modules["a.query"].padded(4)
    getattr(padded, trained)[-1, -1] = 0.5

    assert without_padding(padded, 2).rank == 4


@pytest.mark.parametrize("rank", [None, 0, -1, 4, 9])
def test_a_rank_that_is_none_of_a_padded_module_changes_nothing(adapter, rank):
    assert without_padding(adapter.modules["a.output"], rank).rank == 4
