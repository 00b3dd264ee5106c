"""Causal language models: what the loss counts, and that parts of a batch add up to it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from causal_factories import CAUSAL, TINY_CAUSAL, pairs_of, random_pairs
from torch import nn
from training_factories import plan_for, random_adapter, random_rows
from transformers import BertConfig, LlamaForCausalLM

from hafl_app.lowrank.factors import Adapter, initial_adapter
from hafl_app.training import lora_model
from hafl_app.training.causal import CausalSpec, LoraCausalLM
from hafl_app.training.evaluate import (
    AnswerScores,
    adapter_evaluator,
    evaluate,
    scores_by_category,
)
from hafl_app.training.local import train
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.training.settings import BaseSpec, TrainOptions
from hafl_app.training.step_memory import count_step

pytestmark = pytest.mark.slow

QUERY, KEY = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def model() -> LoraCausalLM:
    return LoraCausalLM(CAUSAL).eval()


def all_rows(examples) -> np.ndarray:
    return np.arange(len(examples.labels))


@torch.no_grad()
def losses_by_hand(model, pairs) -> list[list[float]]:
    """Return the cross entropy of every answer token, one row at a time and without padding."""
    losses = []
    for prompt, answer in pairs:
        row = torch.tensor([[*prompt, *answer]])
        log_p = model.base(input_ids=row).logits[0].log_softmax(-1)
        first = max(len(prompt), 1)
        losses.append([-log_p[i - 1, row[0, i]].item() for i in range(first, row.shape[1])])
    return losses


PAIRS = [([5, 9, 2], [7, 3]), ([8], [4, 4, 1, 6, 30]), ([11, 12, 13, 14], [15])]


class TestLoss:
    def test_is_the_mean_over_the_answers_tokens_alone(self, model):
        examples = pairs_of(PAIRS)
        expected = [loss for row in losses_by_hand(model, PAIRS) for loss in row]

        loss = model.loss(model.batch(examples, all_rows(examples)))

        assert len(expected) == model.num_targets(examples, all_rows(examples)) == 2 + 5 + 1
        assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
        by_row = np.mean([np.mean(row) for row in losses_by_hand(model, PAIRS)])
        assert loss.item() != pytest.approx(by_row, rel=1e-3)  # not a mean of the rows' means

    def test_labels_of_the_prompt_and_of_padding_are_none(self, model):
        examples = pairs_of(PAIRS)
        batch = model.batch(examples, all_rows(examples))
        assert batch.labels.tolist() == [
            [-100, -100, -100, 7, 3, -100],
            [-100, 4, 4, 1, 6, 30],
            [-100, -100, -100, -100, 15, -100],
        ]

    def test_what_stands_first_is_never_a_target(self, model):
        examples = pairs_of(PAIRS)
        batch = model.batch(examples, all_rows(examples))
        relabeled = batch.labels.clone()
        relabeled[:, 0] = 99  # nothing comes before it to predict it from

        changed = replace(batch, labels=relabeled)

        assert model.loss(changed) == model.loss(batch)

    def test_padding_is_on_the_right_and_changes_nothing(self, model):
        alone, together = pairs_of(PAIRS[:1]), pairs_of(PAIRS)

        single = model.batch(alone, all_rows(alone))
        padded = model.batch(together, all_rows(together))

        length = single.input_ids.shape[1]
        assert padded.attention_mask[0].tolist() == [1] * length + [0]
        logits = model(padded.input_ids, padded.attention_mask)[0, :length]
        torch.testing.assert_close(
            logits, model(single.input_ids, single.attention_mask)[0], rtol=1e-4, atol=1e-5
        )

    def test_a_first_token_without_a_prompt_is_no_target(self, model):
        examples = pairs_of([([], [5, 6, 7]), ([1], [2])])
        assert model.num_targets(examples, all_rows(examples)) == 2 + 1

    def test_rows_without_answers_are_refused(self, model):
        rows = random_rows(3)
        with pytest.raises(ValueError, match="causal_lm"):
            model.batch(rows, np.arange(3))


class TestFactors:
    def test_k_and_v_are_smaller_than_q_and_the_logits_layer_is_not_adapted(self, model):
        shapes = model.shapes()

        # 4 heads of 6 for q, 2 for k, of a model 32 wide
        assert (shapes[QUERY].out_features, shapes[QUERY].in_features) == (24, 32)
        assert (shapes[KEY].out_features, shapes[KEY].in_features) == (12, 32)
        assert not any("lm_head" in name for name in shapes)
        assert len(shapes) == 2 * 7

    def test_shapes_are_known_without_weights(self, model):
        assert adapter_shapes(CAUSAL) == model.shapes()

    def test_targets_by_name(self):
        spec = replace(CAUSAL, target_modules=("k_proj", "mlp.up_proj"))
        assert set(adapter_shapes(spec)) == {
            f"model.layers.{i}.{name}"
            for i in (0, 1)
            for name in ("self_attn.k_proj", "mlp.up_proj")
        }

    def test_there_is_no_head_to_train_or_to_send(self, model):
        adapter = initial_adapter(model.shapes(), 3, seed=1)
        model.load(adapter, plan_for(adapter))

        assert CAUSAL.initial_head() == model.head_state() == {}
        assert model.trained(plan_for(adapter)).head == {}

    def test_factors_change_the_logits_as_their_product_does(self, model):
        adapter = random_adapter(model, lambda name: 2 + len(name) % 3)
        bare = LlamaForCausalLM(model.base.config)
        plain = LoraCausalLM(CAUSAL)
        state = {
            k.replace(".base_layer", ""): v
            for k, v in plain.base.state_dict().items()
            if "lora_" not in k
        }
        bare.load_state_dict(state)
        with torch.no_grad():
            for name, factors in adapter.modules.items():
                bare.get_submodule(name).weight += factors.delta_weight()
        ids = torch.tensor([[4, 9, 16, 25]])

        model.load_whole(adapter)

        with torch.no_grad():
            ours, expected = model(ids, torch.ones_like(ids)), bare.eval()(input_ids=ids).logits
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


class TestTraining:
    @pytest.mark.parametrize("micro_batch_size", [1, 3, 7])
    def test_parts_of_a_batch_give_its_gradients(self, model, micro_batch_size):
        adapter, examples = random_adapter(model, 3), random_pairs(16)
        plan = plan_for(adapter, (0, 2), max_steps=1)
        # Plain SGD without clipping: the step is the gradient.
        options = TrainOptions(batch_size=8, optimizer="sgd", max_grad_norm=0.0)

        whole = train(model, adapter, plan, examples, options, seed=3)
        parts = train(
            model, adapter, plan, examples, replace(options, micro_batch_size=micro_batch_size), 3
        )

        assert parts.micro_batch_size == micro_batch_size
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
        for name, factors in whole.adapter.modules.items():
            for ours, expected in (
                (parts.adapter.modules[name].lora_A, factors.lora_A),
                (parts.adapter.modules[name].lora_B, factors.lora_B),
            ):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)

    def test_it_learns_the_answers(self, model):
        examples = pairs_of([([5, 6], [7, 8, 9]), ([5, 9], [3, 3])] * 8)
        adapter = initial_adapter(model.shapes(), 4, seed=2)
        plan = plan_for(adapter, local_epochs=12)

        before = adapter_evaluator(model)(adapter, examples)
        trained = train(
            model, adapter, plan, examples, TrainOptions(batch_size=8, learning_rate=1e-2), seed=0
        ).adapter
        after = adapter_evaluator(model)(trained, examples)

        assert (before.token_accuracy, after.token_accuracy) == (0.0, 1.0)
        assert after.loss < before.loss - 0.3

    @pytest.mark.parametrize("enabled", [True, False])
    def test_checkpointed_gradients_are_the_same(self, model, enabled):
        adapter, examples = random_adapter(model, 3), random_pairs(8)
        plan = plan_for(adapter, max_steps=2)
        options = TrainOptions(batch_size=4, gradient_checkpointing=enabled)

        result = train(model, adapter, plan, examples, options, seed=3)

        assert model.base.model.gradient_checkpointing == enabled
        kept = train(model, adapter, plan, examples, TrainOptions(batch_size=4), seed=3)
        assert not model.base.model.gradient_checkpointing  # the next client's own setting counts
        assert result.loss == pytest.approx(kept.loss, rel=1e-6)


class TestScores:
    def test_are_those_of_all_answer_tokens(self, model):
        model.load_whole(random_adapter(model, 2))
        examples = pairs_of(PAIRS)
        losses = [loss for row in losses_by_hand(model, PAIRS) for loss in row]

        scores = evaluate(model, examples)

        assert (scores.num_tokens, scores.num_examples) == (8, 3)
        assert scores.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert scores.named("test")["test/perplexity"] == pytest.approx(math.exp(np.mean(losses)))

    def test_bounded_batches_score_the_same(self, model, monkeypatch):
        examples = random_pairs(40)
        whole = evaluate(model, examples)
        seen = []
        batch = LoraCausalLM.batch
        monkeypatch.setattr("hafl_app.training.evaluate._LOGITS_AT_ONCE", 512 * 30)
        monkeypatch.setattr(
            LoraCausalLM, "batch", lambda *args: seen.append(len(args[2])) or batch(*args)
        )

        bounded = evaluate(model, examples)

        assert max(seen) <= 30
        assert len(seen) > 5
        assert bounded.loss == pytest.approx(whole.loss, rel=1e-6)
        assert bounded.token_accuracy == whole.token_accuracy

    def test_a_token_is_right_if_it_is_the_most_probable(self, model, monkeypatch):
        class Sure(nn.Module):
            def forward(self, input_ids, attention_mask):
                logits = nn.functional.one_hot((input_ids + 1) % 512, 512).float()
                return type("Output", (), {"logits": logits})

        monkeypatch.setattr(LoraCausalLM, "forward", lambda s, i, m: Sure()(i, m).logits)

        scores = evaluate(model, pairs_of([([3, 4], [5, 6, 9]), ([1], [2])]))

        assert scores.token_accuracy == 3 / 4  # 5, 6 and 2 follow their tokens, 9 does not

    def test_of_a_category_are_those_of_its_rows_alone(self, model):
        pairs = [([3, 4], [5, 6, 9]), ([1], [2]), ([7, 8], [9, 2]), ([5], [6, 1, 3])]
        labels = np.array([0, 2, 0, 2])

        found = scores_by_category(evaluate(model, pairs_of(pairs)), labels, ("a", "b", "c"))

        assert list(found) == ["a", "c"]  # none of b
        for name, rows in (("a", [0, 2]), ("c", [1, 3])):
            its = evaluate(model, pairs_of([pairs[row] for row in rows]))
            expected = {**its.named("x"), "x/num_examples": 2}
            assert found[name] == pytest.approx({k[2:]: v for k, v in expected.items()})
        assert found["a"]["loss"] != pytest.approx(found["c"]["loss"], rel=1e-3)

    def test_one_category_is_no_table(self, model):
        scores = evaluate(model, pairs_of([([3, 4], [5, 6, 9]), ([1], [2])]))
        assert scores_by_category(scores, np.zeros(2, np.int64), ("all",)) == {}

    def test_what_a_node_reports_is_finite(self):
        scores = AnswerScores(loss=1e4, token_accuracy=0.0, num_tokens=5, num_examples=2)
        assert math.isinf(scores.named("test")["test/perplexity"])
        assert all(math.isfinite(value) for value in scores.to_wire().values())


class TestShapes:
    def test_a_shape_makes_a_model_without_files(self):
        shape = {"model_type": "llama", "hidden_size": 40, "intermediate_size": 56}
        shape |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        spec = CausalSpec(replace(TINY_CAUSAL, shape={**shape, "vocab_size": 600}))

        up = adapter_shapes(spec)["model.layers.0.mlp.up_proj"]

        assert (up.out_features, up.in_features) == (56, 40)
        assert LoraCausalLM(spec).shapes() == adapter_shapes(spec)

    @pytest.mark.parametrize("shape", [{"hidden_size": 8}, {"model_type": "no-such"}, [1]])
    def test_a_shape_that_is_none_is_refused_in_one_line(self, shape):
        with pytest.raises(ModelError, match=r"model\.shape") as caught:
            adapter_shapes(CausalSpec(BaseSpec("", random_weights=True, shape=shape)))
        assert "\n" not in str(caught.value)


class TestMemory:
    def count(self, rank: int, **options) -> int:
        return count_step(
            CAUSAL, rank, 8, TrainOptions(batch_size=4, **options), 24, torch.device("cpu")
        ).peak

    def test_is_counted_for_a_causal_model(self):
        assert self.count(1) < self.count(8)

    def test_less_at_once_and_checkpoints_take_less(self):
        assert self.count(8, micro_batch_size=1) < self.count(8)
        assert self.count(8, gradient_checkpointing=True) < self.count(8)


def test_shapes_and_head_need_no_weights(monkeypatch):
    def load_base(*_):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(lora_model, "load_base", load_base)

    adapter = Adapter(initial_adapter(adapter_shapes(CAUSAL), 2, 0).modules, CAUSAL.initial_head())

    assert set(adapter.modules) == set(adapter_shapes(CAUSAL))


def test_an_encoder_is_no_causal_language_model(tmp_path):
    config = BertConfig(hidden_size=8, num_attention_heads=2, architectures=["BertModel"])
    config.save_pretrained(tmp_path)
    spec = CausalSpec(BaseSpec(str(tmp_path), task="causal_lm"))

    with pytest.raises(ModelError, match=r"model\.path=.*: BertModel is no causal language model"):
        adapter_shapes(spec)

    config.is_decoder = True
    config.save_pretrained(tmp_path)
    assert adapter_shapes(spec)
