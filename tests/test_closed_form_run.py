"""Federations whose head is solved from sums of features."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from running import TINY, records, run_tiny
from safetensors.torch import load_file

from hafl_app.client_app import app as client_app
from hafl_app.experiments.centralized import union
from hafl_app.heads.solve import solve
from hafl_app.lowrank.factors import initial_adapter
from hafl_app.publishing.export import ExportRequest, export_adapter
from hafl_app.publishing.truncation import truncate_adapter
from hafl_app.run import build
from hafl_app.run.evaluation import CentralEvaluation
from hafl_app.run.setup import central_text
from hafl_app.server.rounds import RoundFailedError
from hafl_app.training.adapter_files import load_adapter, read_adapter
from hafl_app.training.features import sums_of
from hafl_app.wire.feature_sums import SUMS
from hafl_app.wire.message_types import FEATURE_SUMS, TEMPERATURE_LOSSES
from hafl_app.wire.records import METRICS, NUM_EXAMPLES

CLOSED = "model.head=closed_form"
ALONE = (CLOSED, "federation.num_rounds=0", "federation.fraction_evaluate=0")
ALL_ROWS = "dataset.holdout_fraction=0"  # or the partition decides what is trained on
WIDTH = 32
FIXED = ("model.closed_form.temperature=0.1", "model.closed_form.ridge=0.01")


def head_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "head.safetensors")


def answering(change) -> ClientApp:
    """Return a ClientApp whose replies with sums are changed: `change(partition, reply)`."""
    app = ClientApp()
    app.query()(client_app)
    app.train()(client_app)
    app.evaluate()(client_app)
    app.evaluate(TEMPERATURE_LOSSES)(client_app)

    @app.query(FEATURE_SUMS)
    def query(message, context):
        partition = int(context.node_config["partition-id"])
        return change(partition, client_app(message, context))

    return app


@pytest.fixture(scope="module")
def iid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head") / "iid"
    return folder, run_tiny(folder, *ALONE, *FIXED, ALL_ROWS)


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head") / "refreshed"
    heads: dict[int, torch.Tensor] = {}
    overrides = (CLOSED, "model.head_refresh_every=2", "federation.num_rounds=3")
    summary = run_tiny(
        folder,
        *overrides,
        "model.closed_form.temperature_by=clients",
        on_round=lambda number, adapter: heads.update({number: adapter.head["weight"]}),
    )
    return folder, summary, heads


class TestHeadAlone:
    def test_it_is_scored_and_counted_without_a_round(self, iid):
        folder, summary = iid
        (record,) = records(folder, "round")
        assert record["server_round"] == 0
        assert "test/accuracy" in record["metrics"]
        assert record["bytes_up"] == summary["bytes"]["head"]["up"] > 0
        assert record["bytes_down"] == summary["bytes"]["head"]["down"] > 0
        (head,) = summary["heads"]
        assert (head["server_round"], head["clients"], head["absent"]) == (0, 5, [])

    def test_an_adapter_without_effect_is_not_sent(self, iid):
        _, summary = iid
        assert summary["bytes"]["head"]["down"] < 5 * 2000

    def test_the_partition_does_not_matter(self, iid, tmp_path):
        folder, summary = iid
        skewed = ("partition=dirichlet", "partition.dirichlet_alpha=0.1", "ranks=homogeneous")
        clients = ("federation.num_clients=9", "federation.max_examples_ratio=null")
        other = run_tiny(tmp_path / "a", *ALONE, *FIXED, ALL_ROWS, *skewed, *clients)
        assert other["heads"][0]["examples"] == summary["heads"][0]["examples"]
        mine, theirs = head_of(folder)["weight"], head_of(tmp_path / "a")["weight"]
        assert float((mine - theirs).abs().max()) < 1e-3 * float(mine.abs().max())
        assert other["final"]["test/accuracy"] == summary["final"]["test/accuracy"]

    def test_a_streaming_server_solves_the_same(self, iid, tmp_path):
        folder, _ = iid
        streaming = ("federation.streaming=true", "federation.max_norm_ratio=null")
        run_tiny(tmp_path / "a", *ALONE, *FIXED, ALL_ROWS, *streaming)
        assert torch.equal(head_of(folder)["weight"], head_of(tmp_path / "a")["weight"])

    def test_clients_that_count_alike_are_as_many_examples(self, iid, tmp_path):
        _, summary = iid
        uniform = "federation.weighting=uniform"
        other = run_tiny(tmp_path / "a", *ALONE, ALL_ROWS, uniform)
        examples = summary["heads"][0]["examples"]
        assert other["heads"][0]["examples"] == pytest.approx(examples, rel=0.01)

    def test_rounds_may_follow(self, tmp_path):
        run_tiny(tmp_path / "a", CLOSED, *FIXED, "federation.num_rounds=0")
        resumed = (CLOSED, *FIXED, "federation.num_rounds=1", f"resume={tmp_path / 'a'}")
        assert run_tiny(tmp_path / "a", *resumed)["rounds"] == 1
        run_tiny(tmp_path / "b", CLOSED, *FIXED, "federation.num_rounds=1")
        one, other = (
            load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab"
        )
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_clients_that_never_train_are_not_in_it(self, tmp_path):
        summary = run_tiny(tmp_path / "a", *ALONE, *FIXED, "federation.unseen_clients=1")
        assert summary["heads"][0]["clients"] == 4
        assert summary["heads"][0]["absent"] == []

    def test_it_is_that_of_all_texts_in_one_place(self, iid):
        folder, _ = iid
        overrides = [*TINY, *ALONE, *FIXED, ALL_ROWS]
        settings = build.settings_of_run({"overrides": " ".join(overrides)})
        text = build.federated_text(settings, 5)
        model = build.model(settings, len(text.label_names))
        model.load_whole(initial_adapter(model.shapes(), 2, seed=0))
        sums = sums_of(
            *(model, union([text.train(number) for number in range(5)])),
            settings.model.closed_form,
            precision=settings.client.precision,
            seed=0,
        )
        head = solve(sums, rule="ridge", strength=0.01).head.cooled(0.1)
        saved = head_of(folder)
        largest = float(head.weight.abs().max())
        assert torch.allclose(head.weight.float(), saved["weight"], atol=1e-3 * largest)


def test_class_means_cost_one_vector_a_class(tmp_path):
    summary = run_tiny(tmp_path / "a", *ALONE, "model.closed_form.rule=class_means")
    assert summary["heads"][0]["ridge"] is None
    each = summary["bytes"]["head"]["up"] / 5
    assert 4 * 20 * WIDTH < each < 4 * 20 * WIDTH + 2000


def test_what_changes_nothing_with_model_and_clients_is_said_before_round_1(tmp_path, caplog):
    in_vain = (f"model.closed_form.projection={WIDTH}", "model.closed_form.per_rank=true")
    same = ("ranks=homogeneous", "federation.num_rounds=1", "federation.fraction_evaluate=0")
    run_tiny(tmp_path / "a", CLOSED, *FIXED, *in_vain, *same)
    before, _ = caplog.text.split("closed-form head after round 0")
    assert f"projection={WIDTH} has no effect: the encoder has {WIDTH} features" in before
    assert "per_rank has no effect: no client's rank is below the adapter's" in before


class TestRounds:
    def test_the_head_is_solved_when_it_is_due_and_stays_between(self, refreshed):
        _, summary, heads = refreshed
        assert [head["server_round"] for head in summary["heads"]] == [0, 2]
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[1], heads[2])
        assert torch.equal(heads[2], heads[3])

    def test_clients_receive_it_and_send_none_back(self, refreshed):
        _, summary, _ = refreshed
        by_rank = summary["bytes"]["train"]["by_rank"].values()
        assert all(part["head_bytes_down"] > 0 for part in by_rank)
        assert all(part["head_bytes_up"] == 0 for part in by_rank)

    def test_what_it_costs_is_in_the_rounds(self, refreshed):
        folder, summary, _ = refreshed
        rounds = records(folder, "round")
        phases = [summary["bytes"][phase] for phase in ("train", "evaluate", "head")]
        assert sum(r["bytes_up"] for r in rounds) == sum(phase["up"] for phase in phases)
        assert sum(r["bytes_down"] for r in rounds) == sum(phase["down"] for phase in phases)
        # sums, and losses by temperature
        assert summary["bytes"]["head"]["by_rank"]["4"]["exchanges"] == 2 * 2

    def test_the_saved_adapter_has_the_last_head(self, refreshed):
        folder, _, heads = refreshed
        assert torch.equal(head_of(folder)["weight"], heads[3])
        assert torch.equal(load_adapter(folder / "adapter").model.head_state()["weight"], heads[3])

    def test_a_head_that_is_trained_from_there_changes_in_every_round(self, tmp_path):
        heads = {}
        summary = run_tiny(
            *(tmp_path / "a", CLOSED, "model.closed_form.trained=true"),
            on_round=lambda number, adapter: heads.update({number: adapter.head["weight"]}),
        )
        assert len(summary["heads"]) == 1
        assert not torch.equal(heads[0], heads[1])
        assert summary["bytes"]["train"]["by_rank"]["4"]["head_bytes_up"] > 0


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head") / "by-rank"
    overrides = (CLOSED, *FIXED, ALL_ROWS, "model.closed_form.per_rank=true")
    rates = ("client.learning_rate=0.05", "model.head_refresh_every=1")
    return folder, run_tiny(folder, *overrides, *rates, "federation.score_device_ranks=true")


class TestHeadOfEachRank:
    """The adapter cut to a client's rank has features of its own, and a head from them."""

    def model_and_share(self):
        settings = build.settings_of_run({"overrides": " ".join([*TINY, CLOSED, *FIXED, ALL_ROWS])})
        text = build.federated_text(settings, 5)
        share = union([text.train(one) for one in range(5)])
        return settings, text, build.model(settings, len(text.label_names)), share

    def test_it_is_that_of_all_texts_under_the_cut_adapter(self, by_rank):
        folder, summary = by_rank
        stored = read_adapter(folder / "adapter")
        ranks = sorted(row["rank"] for row in summary["device_ranks"])
        assert list(stored.heads_by_rank) == ranks[:-1]
        settings, _, model, share = self.model_and_share()
        for rank, saved in stored.heads_by_rank.items():
            model.load_whole(truncate_adapter(stored.adapter, rank).adapter)
            sums = sums_of(
                *(model, share, settings.model.closed_form),
                precision=settings.client.precision,
                seed=0,
            )
            weight = solve(sums, rule="ridge", strength=0.01).head.cooled(0.1).weight.float()
            largest = float(weight.abs().max())
            assert torch.allclose(weight, saved["weight"], atol=1e-3 * largest)
            assert not torch.allclose(weight, stored.adapter.head["weight"], atol=1e-2 * largest)

    def test_a_slice_is_scored_with_its_own(self, by_rank):
        folder, summary = by_rank
        stored = read_adapter(folder / "adapter")
        settings, text, _, _ = self.model_and_share()
        evaluation = CentralEvaluation(settings, central_text(settings, text.label_names), {})
        for row in summary["device_ranks"][:-1]:
            cut = truncate_adapter(stored.adapter, row["rank"]).adapter
            own = evaluation.primary_test_metric(cut.with_head(stored.head_at(row["rank"])))
            assert row["federated"] == pytest.approx(own, abs=1e-6)

    def test_an_export_of_a_rank_has_its_head(self, by_rank, tmp_path):
        folder, _ = by_rank
        heads = read_adapter(folder / "adapter").heads_by_rank
        export_adapter(ExportRequest(folder, tmp_path / "whole"))
        export_adapter(ExportRequest(tmp_path / "whole", tmp_path / "cut", ranks=(2,)))
        cut = load_file(tmp_path / "cut" / "rank-2" / "head.safetensors")
        assert torch.equal(cut["weight"], heads[2]["weight"])

    def test_its_cost_is_in_the_last_round(self, by_rank):
        folder, summary = by_rank
        rounds = records(folder, "round")
        phases = [summary["bytes"][phase] for phase in ("train", "evaluate", "head")]
        assert sum(r["bytes_up"] for r in rounds) == sum(phase["up"] for phase in phases)
        cuts = [head["ranks"] for head in summary["heads"]]
        ranks = [[row["rank"]] for row in summary["device_ranks"]]
        assert cuts == [[], [], [], *ranks[:-1]]


@pytest.mark.parametrize("rounds", [2, 3])
def test_an_early_end_solves_for_each_rank_once(rounds, tmp_path):
    # No score is better by more than 1: the second round is the last, of two as of three.
    stopping = ("federation.early_stopping.patience=1", "federation.early_stopping.min_delta=1")
    per_rank = (CLOSED, *FIXED, "model.closed_form.per_rank=true", *stopping)
    summary = run_tiny(tmp_path / "a", *per_rank, f"federation.num_rounds={rounds}")

    assert summary["rounds"] == 2
    solved = [head["ranks"] for head in summary["heads"] if head["ranks"]]
    assert solved == [[2], [4]]
    assert list(read_adapter(tmp_path / "a" / "adapter").heads_by_rank) == [2, 4]


class TestBadSums:
    def lying(self, folder, change, *overrides, **rest):
        def changed(partition: int, reply: Message) -> Message:
            return change(reply) if partition == 2 else reply

        return run_tiny(folder, *ALONE, *FIXED, *overrides, app=answering(changed), **rest)

    def test_a_lie_counts_nowhere_and_its_partition_is_named(self, tmp_path, caplog):
        def negative(reply: Message) -> Message:
            record = dict(reply.content[SUMS])
            moments = np.frombuffer(record["moments"].data, np.float32)
            record["moments"] = Array("float32", moments.shape, "raw", (-moments).tobytes())
            reply.content[SUMS] = ArrayRecord(record)
            return reply

        summary = self.lying(tmp_path / "a", negative)
        assert summary["heads"][0]["absent"] == [2]
        assert summary["heads"][0]["clients"] == 4
        assert summary["bytes"]["head"]["refused"] == 1
        assert "head reply rejected: moments: a trace of" in caplog.text
        assert "closed-form head after round 0: without partitions 2" in caplog.text

    def test_the_counts_must_be_those_that_it_weighs(self, tmp_path, caplog):
        def fewer(reply: Message) -> Message:
            reply.content[METRICS] = MetricRecord({NUM_EXAMPLES: 1})
            return reply

        assert self.lying(tmp_path / "a", fewer)["heads"][0]["absent"] == [2]
        assert "num-examples is 1" in caplog.text

    def test_a_large_reply_is_not_read(self, tmp_path, caplog):
        def large(reply: Message) -> Message:
            extra = Array("uint8", (10**6,), "raw", bytes(10**6))
            reply.content[SUMS] = ArrayRecord({**reply.content[SUMS], "more": extra})
            return reply

        assert self.lying(tmp_path / "a", large)["heads"][0]["absent"] == [2]
        assert "bytes, expected at most" in caplog.text

    def test_nobody_has_more_examples_than_the_operator_allows(self, tmp_path, caplog):
        limit = "federation.max_examples_per_node=20"
        with pytest.raises(RoundFailedError, match="the sums of 0 clients count"):
            run_tiny(tmp_path / "a", *ALONE, *FIXED, limit)
        assert "expected at most 20 (federation.max_examples_per_node)" in caplog.text

    def test_later_a_head_stays_where_nobody_answers(self, tmp_path, caplog):
        rounds: list[int] = []

        def only_before(partition: int, reply: Message) -> Message:
            rounds.append(partition)
            if len(rounds) > 5:
                reply.content = RecordDict()
            return reply

        overrides = (CLOSED, *FIXED, "model.head_refresh_every=1", "federation.num_rounds=1")
        summary = run_tiny(tmp_path / "a", *overrides, app=answering(only_before))
        assert [head["server_round"] for head in summary["heads"]] == [0]
        assert "round 1: the head stays as it is" in caplog.text


@pytest.mark.slow
def test_every_model_with_classes_gets_one(tmp_path):
    images = ("model=vit_digits_random", "dataset=digits", "dataset.max_examples=200")
    summary = run_tiny(tmp_path / "images", *ALONE, *images)
    assert summary["final"]["test/accuracy"] > 0.2
    assert run_tiny(tmp_path / "own head", *ALONE, "model.pooling=cls")["heads"]
    blind = (*FIXED, "federation.central_evaluation=false")
    assert run_tiny(tmp_path / "no model at the server", *ALONE, *blind)["heads"]
    projected = run_tiny(tmp_path / "projected", *ALONE, "model.closed_form.projection=8")
    assert projected["bytes"]["head"]["up"] < 5 * (4 * (8 * 20 + 36) + 8 * 20 + 2000)
