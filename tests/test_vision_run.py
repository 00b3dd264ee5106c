"""Federations of image classifiers in process: nothing above the task is about text alone."""

import numpy as np
import pytest
from running import records, run_tiny
from safetensors.torch import load_file

from hafl_app.client.own_data import own_file, own_share
from hafl_app.config.compose import SettingsError, compose
from hafl_app.run import build
from hafl_app.run.preflight import check
from hafl_app.training.adapter_files import load_adapter
from hafl_app.training.evaluate import evaluate
from hafl_app.training.locate import ModelError
from hafl_app.training.lora_model import resident_model

pytestmark = pytest.mark.slow

VISION = ("experiment=digits", "model=vit_digits_random", "dataset=digits")
CHANCE = 0.1


@pytest.fixture(scope="module", params=["hafl", "hetlora", "flexlora"])
def finished(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run_tiny(folder, *VISION, f"strategy={request.param}")


class TestRun:
    def test_accuracy_rises_well_above_chance(self, finished):
        folder, summary = finished
        first, last = (records(folder, "round")[i]["metrics"] for i in (0, -1))
        assert first["test/accuracy"] < 2 * CHANCE
        for phase in ("validation", "test"):
            assert last[f"{phase}/accuracy"] > 5 * CHANCE
            assert last[f"{phase}/loss"] < first[f"{phase}/loss"]
        assert last["clients/accuracy"] > 5 * CHANCE
        assert summary["metric"] == "accuracy"

    def test_ranks_are_mixed_and_shares_unequal(self, finished):
        folder, _ = finished
        clients = [c for c in records(folder, "client") if c["server_round"] == 1]
        assert {c["rank"] for c in clients} == {2, 4, 8}
        assert len({c["num_examples"] for c in clients}) > 1

    def test_the_head_travels_with_the_factors(self, finished):
        _, summary = finished
        for row in summary["bytes"]["train"]["by_rank"].values():
            assert row["head_bytes_up"] > 0

    def test_the_saved_adapter_scores_the_last_line(self, finished):
        folder, summary = finished
        loaded = load_adapter(folder / "adapter")
        scores = evaluate(loaded.model, build.federated_text(compose(VISION), 5).test)
        assert scores.named("test")["test/accuracy"] == summary["final"]["test/accuracy"]
        assert loaded.label_names == tuple("0123456789")


@pytest.mark.parametrize(
    "overrides", [("model.head=local",), ("model.head=frozen",), ("federation.streaming=true",)]
)
def test_other_ways_to_run_work(tmp_path, overrides):
    more = ("federation.max_norm_ratio=null", "federation.num_rounds=1")
    summary = run_tiny(tmp_path, *VISION, *more, *overrides)
    assert summary["status"] == "finished"


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    small = (*VISION, "dataset.max_examples=300", "client.local_epochs=1")
    run_tiny(tmp_path / "whole", *small)
    run_tiny(tmp_path / "cut", *small, "federation.num_rounds=1")
    run_tiny(tmp_path / "cut", *small, f"resume={tmp_path / 'cut'}")

    whole, cut = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "cut")
    )
    assert set(whole) == set(cut)
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)


class TestSettings:
    def test_images_and_model_pass_the_checks(self):
        resident_model.cache_clear()
        check(compose(["experiment=digits"]))
        assert resident_model.cache_info().currsize == 0  # no weights were needed

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (("model=vit_digits_random",), "dataset.source=synthetic"),
            (("model=vit_digits_random", "dataset=on_device"), "dataset.source=on_device"),
            (
                ("model=vit_digits_random", "dataset=dolly", "dataset.path=x"),
                "dataset.source=dolly",
            ),
            (("model=tiny_random", "dataset=digits"), "model.task=classification"),
            (("model=tiny_random_causal", "dataset=digits"), "model.task=causal_lm"),
            (("experiment=digits", "ranks=from_memory"), "ranks=from_memory"),
            (("experiment=digits", "model.pooling=mean"), "model.pooling=mean"),
            (("experiment=digits", "model.shape=null"), "model.shape must be given"),
        ],
    )
    def test_what_does_not_go_together_is_refused_in_one_line(self, overrides, words):
        with pytest.raises(ValueError, match=words) as caught:
            check(compose(overrides))
        assert "\n" not in str(caught.value)

    def test_the_node_refuses_it_as_well(self):
        with pytest.raises(SettingsError, match="ranks=from_memory"):
            build.settings_of_run({"overrides": "experiment=digits ranks=from_memory"})

    def test_a_node_with_text_of_its_own_refuses_to_train_on_it(self, tmp_path):
        file = tmp_path / "mine.csv"
        file.write_text("text,label\nfive is written,5\nthree is read,3\none is left,1\n")
        settings = compose(["experiment=digits"])
        share = own_share(settings, own_file(settings, {"data-path": file}), tuple("0123456789"))

        with pytest.raises(ModelError, match="image classifier, which reads none"):
            share.train()
