"""Clients that never train, through whole runs in process."""

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from running import LONE, TINY, instructions, records, run_tiny

from hafl_app.client_app import app as client_app
from hafl_app.config.compose import SettingsError, compose
from hafl_app.run import build, evaluation
from hafl_app.run.preflight import check
from hafl_app.server.held_out_clients import draw_unseen
from hafl_app.training.answers import GenerationScores
from hafl_app.wire.faults import Fault, error_reply

pytestmark = pytest.mark.slow


def recording(asked: dict[str, list[int]], silent: tuple[int, ...] = ()) -> ClientApp:
    """Return a ClientApp that notes which partitions are asked to train and to score."""
    app = ClientApp()
    app.query()(client_app)

    def note(kind, message: Message, context) -> Message:
        partition = int(context.node_config["partition-id"])
        asked.setdefault(kind, []).append(partition)
        if kind == "evaluate" and partition in silent:
            return error_reply(message, Fault.WORKER_FAILED, "away")
        return client_app(message, context)

    app.train()(lambda message, context: note("train", message, context))
    app.evaluate()(lambda message, context: note("evaluate", message, context))
    return app


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, asked = tmp_path_factory.mktemp("unseen") / "out", {}
    summary = run_tiny(
        folder, LONE, "federation.unseen_clients=2", "dataset.num_train=300", app=recording(asked)
    )
    return folder, summary, asked, sorted(draw_unseen(5, 2, seed=0))


class TestRun:
    def test_an_unseen_client_is_never_asked_to_train(self, finished):
        _, _, asked, unseen = finished
        assert set(asked["train"]) == set(range(5)) - set(unseen)  # lone training included

    def test_it_is_asked_to_score_once_behind_the_last_round(self, finished):
        _, _, asked, unseen = finished
        # two rounds of the three seen clients, in some order, and then the others
        assert sorted(asked["evaluate"][6:]) == unseen
        assert not set(asked["evaluate"][:6]) & set(unseen)

    def test_seen_and_unseen_are_kept_apart(self, finished):
        folder, summary, _, unseen = finished
        clients = summary["clients"]
        assert clients["unseen"]["partitions"] == unseen
        last = records(folder, "round")[-1]["metrics"]
        assert clients["seen"]["accuracy"] == last["clients/accuracy"]
        assert 0 <= clients["unseen"]["accuracy"] <= 1
        assert clients["seen"]["loss"] != clients["unseen"]["loss"]

    def test_their_traffic_is_counted_apart(self, finished):
        _, summary, _, _ = finished
        counted = summary["bytes"]["unseen"]["by_rank"].values()
        assert sum(row["exchanges"] for row in counted) == 2

    def test_without_any_the_summary_says_nothing_of_them(self, tmp_path):
        summary = run_tiny(tmp_path, "federation.num_rounds=1")
        assert "clients" not in summary

    @pytest.mark.parametrize("strategy", ["hetlora", "flexlora", "zero_padding"])
    def test_every_method_and_streaming_too(self, tmp_path, strategy):
        asked: dict[str, list[int]] = {}
        summary = run_tiny(
            tmp_path,
            f"strategy={strategy}",
            "federation.unseen_clients=1",
            "federation.streaming=true",
            "federation.max_norm_ratio=null",
            "federation.num_rounds=1",
            app=recording(asked),
        )
        (unseen,) = draw_unseen(5, 1, seed=0)
        assert unseen not in asked["train"]
        assert summary["clients"]["unseen"]["partitions"] == [unseen]

    def test_one_that_does_not_answer_is_left_out(self, tmp_path):
        first, second = sorted(draw_unseen(5, 2, seed=0))
        summary = run_tiny(
            tmp_path,
            "federation.unseen_clients=2",
            "federation.num_rounds=1",
            app=recording({}, silent=(first,)),
        )
        assert summary["clients"]["unseen"]["partitions"] == [second]


class TestSettings:
    def test_the_draw_follows_from_the_seed_alone(self):
        settings = compose([*TINY, "federation.unseen_clients=2", "seed=4"])
        drawn = build.strategy(settings).coordinator.participation.held_out
        assert drawn == draw_unseen(5, 2, seed=4)
        assert len({draw_unseen(5, 2, seed) for seed in range(20)}) > 3

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["federation.unseen_clients=5"], r"expected below federation\.num_clients=5"),
            (["federation.unseen_clients=1", "model.head=local"], "untrained head"),
            (["federation.unseen_clients=1", "privacy=central_dp"], "privacy=central_dp"),
            (["federation.generate_examples=3"], "model.task=causal_lm only"),
        ],
    )
    def test_what_has_no_meaning_is_refused_before_the_run(self, overrides, message):
        with pytest.raises(SettingsError, match=message) as caught:
            check(compose([*TINY, *overrides]))
        assert "\n" not in str(caught.value)


def test_min_replies_counts_only_those_that_train(tmp_path):
    with pytest.raises(ValueError, match="only 3 of 3 clients"):
        run_tiny(tmp_path, "federation.unseen_clients=2", "federation.min_replies=4")


class TestGeneration:
    @pytest.fixture
    def pairs(self, tmp_path_factory):
        rows = [
            {"instruction": f"what is {i % 7}", "input": "", "output": f"it is {i % 7}"}
            for i in range(60)
        ]
        return (
            *instructions(tmp_path_factory.mktemp("pairs"), rows),
            "dataset.max_length=20",
            "federation.num_rounds=1",
            "federation.alone_clients_per_rank=0",
        )

    def test_answers_are_scored_after_the_last_round(self, tmp_path, pairs):
        summary = run_tiny(
            tmp_path, *pairs, "federation.generate_examples=4", "federation.generate_tokens=3"
        )
        generation = summary["generation"]
        assert (generation["num_examples"], generation["left_out"]) == (4, 0)
        assert {"rouge-l", "exact-match"} <= set(generation)

    def test_and_not_without_being_asked_for(self, tmp_path, pairs):
        assert "generation" not in run_tiny(tmp_path, *pairs)

    def test_of_the_last_adapter_and_the_test_set(self, tmp_path, pairs, monkeypatch):
        given = {}

        def score(model, base, prompts, references, options, categories):
            factors = model.trainable_factors().values()
            given["lora_B"] = [lora_B.detach().abs().sum().item() for _, lora_B in factors]
            given.update(options=options, pairs=(prompts, references))
            return GenerationScores(0.25, 0.5, 4)

        monkeypatch.setattr(evaluation, "score_generation", score)
        summary = run_tiny(tmp_path, *pairs, "federation.generate_examples=4")

        assert summary["generation"]["rouge-l"] == 0.25
        assert (given["options"].max_length, given["options"].max_new_tokens) == (20, 64)
        prompts, references = given["pairs"]
        assert all("what is" in prompt for prompt in prompts)
        assert len(prompts) == len(references) == 6  # a tenth of the file
        assert any(value > 0 for value in given["lora_B"])  # trained, not as at the start
