import torch
from flwr.app import ArrayRecord, RecordDict

from hafl_app.client.error_feedback import read_errors, write_errors
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.quantize import RoundingErrors


def errors(components, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = len(components)
    return RoundingErrors(
        components,
        LoraFactors(
            torch.randn(rank, 5, generator=generator),
            torch.randn(rank, 7, generator=generator).T,  # as rounding makes it: transposed
        ),
    )


def test_a_client_keeps_nothing_at_first():
    assert read_errors(RecordDict()) == {}


def test_what_is_kept_survives_the_state_bit_for_bit():
    state = RecordDict({"local-head": ArrayRecord({"w": torch.ones(3)})})
    kept = {"layer.0.query": errors((4, 0), 1), "layer.0/odd": errors((2,), 2)}

    write_errors(state, kept)
    got = read_errors(state)

    assert got.keys() == kept.keys()
    for name, before in kept.items():
        assert got[name].components == before.components
        assert torch.equal(got[name].errors.lora_A, before.errors.lora_A)
        assert torch.equal(got[name].errors.lora_B, before.errors.lora_B)
    assert "local-head" in state


def test_what_is_kept_now_replaces_what_was_kept_before():
    state = RecordDict()
    write_errors(state, {"query": errors((4, 0), 1), "dense": errors((1,), 3)})
    write_errors(state, {"query": errors((2,), 2)})

    assert read_errors(state).keys() == {"query"}
    assert read_errors(state)["query"].components == (2,)


def test_no_component_is_none_after_a_round_as_well():
    state = RecordDict()
    write_errors(state, {"query": errors((), 1)})

    assert read_errors(state)["query"].components == ()
    assert read_errors(state)["query"].errors.lora_A.shape == (0, 5)
