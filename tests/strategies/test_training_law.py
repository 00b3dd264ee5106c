"""The law of training, for every method in conf/strategy.

Under the real `train()`, codec and validation: what a plan trains moves, every component and every
factor; what it does not train stays equal to the bit and is not uploaded; the bytes planned are the
bytes sent. The last class breaks the code, and the law must notice.
"""

import pytest
import torch
from driving import STRATEGIES
from training_law import (
    SPEC,
    Trained,
    check_merged,
    check_training,
    check_upload,
    one_module_per_choice,
    own_plan,
    strategy_on,
    train_round,
)

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.privacy.mechanism import trained_part
from hafl_app.server.aggregation import merge
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.training import epochs, lora_model
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.lora_model import LoraModel


@pytest.fixture(scope="module")
def model() -> LoraClassifier:
    return LoraClassifier(SPEC)


def check_law(model: LoraClassifier, strategy: HeterogeneousLora, clients: list[Trained]) -> None:
    for client in clients:
        check_training(client, model.initial_head)
        check_upload(client)
    before = strategy.global_adapter
    after = merge(strategy, before, [client.reply.update for client in clients])
    if strategy.traits.keeps_components:  # others make new factors in every round
        check_merged(before, after, clients)


@pytest.mark.parametrize("name", STRATEGIES)
class TestLaw:
    def test_holds_for_the_plan_that_the_method_makes(self, model, name):
        strategy = strategy_on(model, name, "averaged")
        check_law(model, strategy, train_round(model, strategy, own_plan))

    def test_holds_for_each_choice_of_factors_and_a_frozen_head(self, model, name):
        strategy = strategy_on(model, name, "frozen")
        check_law(model, strategy, train_round(model, strategy, one_module_per_choice))

    def test_holds_with_a_head_that_is_sent(self, model, name):
        strategy = strategy_on(model, name, "sent")
        clients = train_round(model, strategy, own_plan)
        assert all(client.sent.head for client in clients)
        check_law(model, strategy, clients)


class TestItFails:
    """Each test breaks the code in one way."""

    def broken(self, model, match):
        strategy = strategy_on(model, "hafl", "averaged")
        with pytest.raises(AssertionError, match=match):
            check_law(model, strategy, train_round(model, strategy, one_module_per_choice))

    def test_when_an_untrained_factor_is_not_frozen(self, model, monkeypatch):
        monkeypatch.setattr(lora_model, "freeze_untrained", lambda *_: None)
        self.broken(model, "lora_B, trainable_components: a component moves")

    def test_when_frozen_components_are_trained(self, model, monkeypatch):
        load = LoraModel.load
        monkeypatch.setattr(
            LoraModel,
            "load",
            lambda self, adapter, plan: load(self, adapter, plan.training_everything()),
        )
        self.broken(model, "trainable_components: .* after, .* before")

    def test_when_a_frozen_head_is_trained(self, model, monkeypatch):
        load = LoraModel.load

        def unfrozen(self, adapter, plan):
            load(self, adapter, plan)
            self.head_module.requires_grad_(True)

        def optimizer(model, plan, options):
            made = build(model, plan, options)
            made.add_param_group({"params": list(model.head_module.parameters())})
            return made

        build = epochs.build_optimizer
        monkeypatch.setattr(LoraModel, "load", unfrozen)
        monkeypatch.setattr(epochs, "build_optimizer", optimizer)
        strategy = strategy_on(model, "hafl", "frozen")
        with pytest.raises(AssertionError, match="head"):
            check_law(model, strategy, train_round(model, strategy, own_plan))

    def test_when_a_trained_factor_is_left_out_of_the_optimizer(self, model, monkeypatch):
        build = epochs.build_optimizer

        def without_one(*args):
            optimizer = build(*args)
            optimizer.param_groups[-1]["params"].pop()
            return optimizer

        monkeypatch.setattr(epochs, "build_optimizer", without_one)
        self.broken(model, "lora_B, trainable_components: a component stays")

    def test_when_a_single_component_gets_no_gradient(self, model, monkeypatch):
        load = LoraModel.load

        def without_one(self, adapter, plan):
            load(self, adapter, plan)
            for lora_A, _ in self.trainable_factors().values():
                if lora_A.requires_grad:
                    lora_A.register_hook(lambda g: torch.cat([g[:1], 0 * g[1:2], g[2:]]))

        monkeypatch.setattr(LoraModel, "load", without_one)
        self.broken(model, "lora_A, trainable_components: a component stays")

    def test_when_the_upload_is_taken_from_what_was_sent(self, model, monkeypatch):
        load, received = LoraModel.load, []

        def remembering(self, adapter, plan):
            received.append(adapter)
            load(self, adapter, plan)

        monkeypatch.setattr(LoraModel, "load", remembering)
        monkeypatch.setattr(
            LoraModel, "trained", lambda self, plan: trained_part(received[-1], plan)
        )
        self.broken(model, "read: a component stays")

    def test_when_an_untrained_factor_is_uploaded(self, model, monkeypatch):
        monkeypatch.setattr(LoraFactors, "only", lambda self, trained: self)
        self.broken(model, "lora_B is uploaded, the plan trains lora_A alone")
