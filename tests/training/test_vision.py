"""Image classifiers: what they read, what they learn, and adapters that others can load."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from training_factories import assert_same_adapter, plan_for, random_adapter, random_rows
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from vision_factories import IMAGES, LABELS, SHAPE, SPEC, Images, random_images

from hafl_app.lowrank.factors import initial_adapter
from hafl_app.training.adapter_files import load_adapter, save_adapter
from hafl_app.training.base_model import base_without_weights
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.evaluate import adapter_evaluator, evaluate, predict_logits
from hafl_app.training.local import train
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.training.settings import BaseSpec, TrainOptions
from hafl_app.training.vision import ImageSpec, LoraImageClassifier

WIDE = "vit.layers.1.mlp.fc1"  # (40, 24)


@pytest.fixture(scope="module")
def model() -> LoraImageClassifier:
    return LoraImageClassifier(SPEC).eval()


class TestModel:
    def test_every_linear_layer_but_the_head_is_adapted(self, model):
        shapes = model.shapes()

        assert (shapes[WIDE].out_features, shapes[WIDE].in_features) == (40, 24)
        assert len(shapes) == 2 * 6  # query, key, value, output and two of the perceptron
        assert not any("classifier" in name for name in shapes)

    def test_shapes_are_known_without_weights(self, model):
        assert adapter_shapes(SPEC) == model.shapes()

    def test_its_own_classifier_is_the_head(self, model):
        assert {k: tuple(v.shape) for k, v in SPEC.initial_head().items()} == {
            "weight": (LABELS, 24),
            "bias": (LABELS,),
        }
        torch.testing.assert_close(SPEC.initial_head(), model.initial_head, rtol=0, atol=0)

    def test_the_seed_decides_all_weights(self, model):
        again, other = SPEC.build(), replace(SPEC, seed=8).build()
        weight = "base.vit.embeddings.patch_embeddings.projection.weight"
        assert torch.equal(again.get_parameter(weight), model.get_parameter(weight))
        assert not torch.equal(other.get_parameter(weight), model.get_parameter(weight))

    def test_a_model_without_a_classifier_is_refused(self, model):
        with pytest.raises(ModelError, match="Linear has no classifier"):
            SPEC.unadapted(nn.Linear(3, 2))

    def test_a_shape_is_needed_without_files(self):
        with pytest.raises(ModelError, match=r"model\.shape must be given"):
            base_without_weights(replace(IMAGES, shape=""), LABELS)


class TestBatch:
    def test_holds_the_images_asked_for(self, model):
        images = random_images(9)

        batch = model.batch(images, np.array([4, 0, 7]))

        np.testing.assert_array_equal(batch.pixel_values, images.pixels[[4, 0, 7]])
        assert batch.labels.tolist() == images.labels[[4, 0, 7]].tolist()

    @pytest.mark.parametrize("size", [(2, 6, 4), (1, 4, 6), (2, 4, 4)])
    def test_images_of_another_size_are_refused_in_one_line(self, model, size):
        images = Images(np.zeros((5, *size), np.float32), np.zeros(5, np.int64))
        with pytest.raises(ModelError, match=r"\(2, 4, 6\)") as caught:
            model.batch(images, np.arange(5))
        assert str(size) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_text_is_refused(self, model):
        with pytest.raises(TypeError, match="reads images"):
            model.batch(random_rows(3), np.arange(3))

    def test_a_model_of_text_refuses_images(self):
        bert = LoraClassifier(ClassifierSpec(BaseSpec("", random_weights=True), LABELS))
        with pytest.raises(TypeError, match="reads text"):
            bert.batch(random_images(3), np.arange(3))


class TestTraining:
    def test_factors_change_the_logits_as_their_product_does(self, model):
        adapter = random_adapter(model, lambda name: 2 + len(name) % 3)
        bare = ViTForImageClassification(model.base.config).eval()
        state = {k.replace(".base_layer", ""): v for k, v in model.base.state_dict().items()}
        bare.load_state_dict({k: v for k, v in state.items() if "lora_" not in k})
        bare.classifier.load_state_dict(dict(adapter.head))
        with torch.no_grad():
            for name, factors in adapter.modules.items():
                bare.get_submodule(name).weight += factors.delta_weight()
        images = random_images(5)

        model.load_whole(adapter)

        with torch.no_grad():
            expected = bare(torch.from_numpy(images.pixels)).logits.numpy()
        np.testing.assert_allclose(predict_logits(model, images), expected, rtol=1e-4, atol=1e-4)

    def test_the_loss_is_the_mean_cross_entropy_of_the_images(self, model):
        model.load_whole(random_adapter(model, 2))
        images = random_images(7)
        logits = torch.from_numpy(predict_logits(model, images))
        by_hand = -logits.log_softmax(1)[torch.arange(7), torch.from_numpy(images.labels)].mean()

        loss = model.loss(model.batch(images, np.arange(7)))

        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
        assert evaluate(model, images).loss == pytest.approx(by_hand.item(), rel=1e-5)

    @pytest.mark.parametrize("micro_batch_size", [1, 3])
    def test_parts_of_a_batch_give_its_gradients(self, model, micro_batch_size):
        adapter, images = random_adapter(model, 3), random_images(16)
        plan = plan_for(adapter, (0, 2), max_steps=1)
        # Plain SGD without clipping: the step is the gradient.
        options = TrainOptions(batch_size=8, optimizer="sgd", max_grad_norm=0.0)

        whole = train(model, adapter, plan, images, options, seed=3)
        options = replace(options, micro_batch_size=micro_batch_size)
        parts = train(model, adapter, plan, images, options, seed=3)

        for name, factors in whole.adapter.modules.items():
            ours = parts.adapter.modules[name]
            torch.testing.assert_close(ours.lora_A, factors.lora_A, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(ours.lora_B, factors.lora_B, rtol=1e-4, atol=1e-6)

    def test_it_learns_what_new_images_show(self, model):
        adapter = initial_adapter(model.shapes(), 4, seed=2).with_head(model.initial_head)
        plan = plan_for(adapter, local_epochs=6)
        score = adapter_evaluator(model)

        before = score(adapter, random_images(120, seed=9))
        trained = train(
            model,
            adapter,
            plan,
            random_images(200),
            TrainOptions(batch_size=16, learning_rate=1e-2),
            seed=0,
        )
        after = score(trained.adapter, random_images(120, seed=9))

        assert before.accuracy < 0.6
        assert after.accuracy > 0.85

    def test_checkpointed_gradients_are_the_same(self, model):
        adapter, images = random_adapter(model, 3), random_images(8)
        plan, options = plan_for(adapter, max_steps=2), TrainOptions(batch_size=4)

        kept = train(model, adapter, plan, images, options, seed=3)
        again = train(
            model, adapter, plan, images, replace(options, gradient_checkpointing=True), seed=3
        )

        assert again.loss == pytest.approx(kept.loss, rel=1e-6)


class TestSaved:
    def test_comes_back_as_it_was(self, model, tmp_path):
        adapter, images = random_adapter(model, 3), random_images(5)
        model.load_whole(adapter)
        expected = predict_logits(model, images)

        save_adapter(tmp_path / "a", adapter, SPEC, label_names=("x", "y", "z"), max_length=4)
        loaded = load_adapter(tmp_path / "a")

        np.testing.assert_array_equal(predict_logits(loaded.model, images), expected)
        with pytest.raises(ModelError, match="reads none"):
            loaded.tokenize(["a text"])

    def test_plain_peft_and_transformers_load_it(self, tmp_path):
        base = tmp_path / "base"
        torch.manual_seed(0)
        values = {k: v for k, v in SHAPE.items() if k != "model_type"}
        ViTForImageClassification(ViTConfig(**values, num_labels=LABELS)).save_pretrained(base)
        spec = ImageSpec(
            BaseSpec(str(base), pooling="cls", task="image_classification"), LABELS, seed=5
        )
        model, images = spec.build(), random_images(6)
        adapter = random_adapter(model, lambda name: 2 + len(name) % 3)  # a rank for each module
        model.load_whole(adapter)
        save_adapter(tmp_path / "a", adapter, spec, label_names=("x", "y", "z"), max_length=4)

        stock = AutoModelForImageClassification.from_pretrained(base, num_labels=LABELS)
        peft_model = PeftModel.from_pretrained(stock, tmp_path / "a").eval()

        with torch.no_grad():
            theirs = peft_model(pixel_values=torch.from_numpy(images.pixels)).logits.numpy()
        np.testing.assert_allclose(theirs, predict_logits(model, images), rtol=1e-4, atol=1e-5)
        assert type(peft_model) is PeftModel  # not that of a model of text

    def test_trained_factors_are_saved_bit_for_bit(self, model, tmp_path):
        adapter = initial_adapter(model.shapes(), 2, seed=2).with_head(model.initial_head)
        trained = train(
            model, adapter, plan_for(adapter), random_images(9), TrainOptions(batch_size=4), seed=0
        ).adapter
        save_adapter(tmp_path / "a", trained, SPEC, label_names=("x", "y", "z"), max_length=4)

        model = load_adapter(tmp_path / "a").model

        plan = plan_for(trained)
        assert_same_adapter(model.trained(plan), trained)
