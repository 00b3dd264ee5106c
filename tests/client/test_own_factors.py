"""A client's own lora_B: kept by component, put beside what was received, never uploaded."""

import shlex

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from running import TINY

from hafl_app.client.own_factors import keep_lora_B, with_own_lora_B
from hafl_app.client_app import app
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.wire.records import (
    OWN_LORA_B,
    AdapterArrays,
    adapter_content,
    plan_record,
    read_adapter,
)

SHAPES = {"query": ModuleShape(7, 5)}


def plan_of(*components, own=True):
    return TrainPlan({"query": ModulePlan(components, components, own_lora_B=own)})


def factors(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    lora_A, lora_B = (torch.randn(n, rank, generator=generator) for n in (5, 7))
    return LoraFactors(lora_A.T, lora_B)


def received(rank):
    return Adapter({"query": factors(rank, 1).only("A")}, {"bias": torch.ones(3)})


class TestTheState:
    def test_a_client_begins_at_zero(self):
        got = with_own_lora_B(RecordDict(), received(2), plan_of(0, 1), SHAPES)
        assert torch.equal(got.modules["query"].lora_B, torch.zeros(7, 2))
        assert torch.equal(got.modules["query"].lora_A, received(2).modules["query"].lora_A)
        assert torch.equal(got.head["bias"], torch.ones(3))

    def test_what_was_trained_is_there_again_by_component(self):
        state, first, second = RecordDict(), factors(2, 3), factors(1, 4)
        keep_lora_B(state, Adapter({"query": first}), plan_of(3, 1))
        keep_lora_B(state, Adapter({"query": second}), plan_of(1))

        got = with_own_lora_B(state, received(4), plan_of(0, 1, 2, 3), SHAPES)

        expected = torch.zeros(7, 4)
        expected[:, 3], expected[:, 1] = first.lora_B[:, 0], second.lora_B[:, 0]
        assert torch.equal(got.modules["query"].lora_B, expected)

    def test_other_plans_neither_read_nor_write_it(self):
        state, sent = RecordDict(), Adapter({"query": factors(2, 3)})
        keep_lora_B(state, sent, plan_of(0, 1, own=False))
        assert OWN_LORA_B not in state
        assert with_own_lora_B(state, sent, plan_of(0, 1, own=False), SHAPES) is sent


class TestOnANode:
    """A node is asked to train lora_A, and to keep its lora_B."""

    OVERRIDES = (*TINY, "strategy=fedsa_lora", "federation.fraction_evaluate=0")

    def grid(self):
        return InProcessGrid(app, 5, {"overrides": shlex.join(self.OVERRIDES)})

    def train(self, grid, server_round=1):
        settings = build.settings_of_run({"overrides": shlex.join(self.OVERRIDES)})
        shapes = adapter_shapes(build.model_spec(settings, 20))
        rng, modules = np.random.default_rng(3), {}
        for name, shape in shapes.items():
            lora_A = rng.normal(size=(2, shape.in_features)).astype(np.float32)
            modules[name] = (lora_A, np.zeros((0, 2), np.float32))
        plan = TrainPlan({n: ModulePlan((0, 1), (0, 1), own_lora_B=True) for n in shapes})
        content = adapter_content(
            AdapterArrays(modules),
            plan=plan_record(plan),
            config=ConfigRecord({"server-round": server_round}),
        )
        with server_identity():
            message = Message(content, 1, MessageType.TRAIN)
            (reply,) = grid.send_and_receive([message])
        assert not reply.has_error(), reply.error.reason
        return read_adapter(reply.content).modules

    @pytest.mark.slow
    def test_lora_b_stays_and_the_next_round_starts_from_it(self):
        grid = self.grid()
        first = self.train(grid)
        kept = grid._contexts[1].state.array_records[OWN_LORA_B].to_torch_state_dict()

        again, forgetful = self.train(grid), self.train(self.grid())

        for name, (_, lora_B) in first.items():
            assert lora_B.shape == (0, 2)
            assert float(kept[name].norm()) > 0
            # The same request: only what the node kept can make a difference.
            assert np.array_equal(forgetful[name][0], first[name][0])
            assert not np.array_equal(again[name][0], first[name][0])
