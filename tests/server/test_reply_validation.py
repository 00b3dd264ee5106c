"""Each check of a reply: the honest one passes, and one thing wrong is refused by name."""

import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from hypothesis import given
from hypothesis import strategies as st
from layout_words import change_layout, write_layout

from hafl_app.engines.in_process import server_identity
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.server.outliers import importance_outliers, norm_outliers
from hafl_app.server.reply_validation import (
    ReplyError,
    check_finite,
    check_shapes,
    check_size,
    read_metrics,
    read_update,
)
from hafl_app.training.adapter_arrays import from_arrays
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import METRICS, AdapterArrays, adapter_content, message_bytes

# Never square, and modules that differ.
SHAPES = {"query": (7, 5), "dense": (6, 9)}
HEAD = {"weight": (3, 7), "bias": (3,)}
PLAN = TrainPlan(
    {"query": ModulePlan((0, 1, 2, 3), (1, 3)), "dense": ModulePlan((0, 1, 2, 3), (2, 0, 3))},
    importance="smoothed",
)
PROFILE = NodeProfile(4, 99, 2, 31, "cpu")
METRIC_VALUES = {"num-examples": 31, "loss": 0.7, "steps": 2, "seconds": 1.5}


def arrays(plan=PLAN, shapes=SHAPES, head=HEAD, ranks=None, scores=None):
    """Return an adapter as the plan wants it, all ones where not said otherwise."""
    modules, importance = {}, {}
    for name, shape in shapes.items():
        trained = len(plan.modules[name].trainable) if name in plan.modules else 1
        rank = (ranks or {}).get(name, trained)
        height, width = plan.modules[name].uploaded_sides(shape) if name in plan.modules else shape
        modules[name] = (np.ones((rank, width), np.float32), np.ones((height, rank), np.float32))
        if plan.importance != "none":
            importance[name] = np.ones(trained, np.float32)
    return AdapterArrays(
        modules,
        {name: np.ones(shape, np.float32) for name, shape in head.items()},
        importance if scores is None else scores,
    )


def message(content):
    with server_identity():
        request = Message(RecordDict(), 2, MessageType.TRAIN)
        request.metadata.__dict__["_message_id"] = "m"
        return Message(content, reply_to=request)


def reply(update=None, **metrics):
    values = {k.replace("_", "-"): v for k, v in metrics.items()}
    return message(
        adapter_content(update or arrays(), **{METRICS: MetricRecord(METRIC_VALUES | values)})
    )


def refused(update, match, plan=PLAN, head=HEAD, shapes=SHAPES):
    with pytest.raises(ReplyError, match=match) as caught:
        got = read_update(reply(update), plan, head, shapes)
        check_finite(from_arrays(got.modules, got.head))
    assert "\n" not in str(caught.value)


class TestUpdate:
    def test_what_the_plan_asked_for_is_read_bit_for_bit(self):
        sent = arrays()
        got = read_update(reply(sent), PLAN, HEAD, SHAPES)
        assert list(got.modules) == list(SHAPES)
        assert np.array_equal(got.modules["dense"][1], sent.modules["dense"][1])
        assert np.array_equal(got.importance["query"], sent.importance["query"])
        assert got.head["weight"].shape == (3, 7)

    def test_a_missing_module_is_named(self):
        refused(
            arrays(shapes={"query": (7, 5)}),
            r"modules: 1 missing \['dense'\], 0 not asked for \[\]",
        )

    def test_an_extra_module_is_named(self):
        refused(
            arrays(shapes=SHAPES | {"key": (4, 3)}),
            r"modules: 0 missing \[\], 1 not asked for \['key'\]",
        )

    def test_factors_of_another_layer_size_are_refused_with_both(self):
        refused(
            arrays(shapes={"query": (5, 7), "dense": (6, 9)}),
            r"query: factors of a \(5, 7\) weight, expected \(7, 5\)",
        )

    @pytest.mark.parametrize(("factors", "untrained"), [("A", "lora_B"), ("B", "lora_A")])
    def test_a_factor_that_is_not_trained_is_refused_by_name(self, factors, untrained):
        module = replace(PLAN.modules["dense"], factors=factors)
        plan = replace(PLAN, modules={**PLAN.modules, "dense": module})

        read_update(reply(arrays(plan)), plan, HEAD, SHAPES)
        refused(
            arrays(),
            f"dense: {untrained} is uploaded, the plan trains lora_{factors} alone",
            plan=plan,
        )

    def test_a_trained_factor_that_is_missing_is_refused(self):
        module = replace(PLAN.modules["dense"], factors="B")
        alone = replace(PLAN, modules={**PLAN.modules, "dense": module})
        refused(arrays(alone), r"dense: factors of a \(6, 0\) weight, expected \(6, 9\)")

    def test_layer_sizes_can_be_checked_alone(self):
        with pytest.raises(ReplyError, match=r"dense: .*\(9, 6\) weight, expected \(6, 9\)"):
            check_shapes(arrays(shapes={"query": (7, 5), "dense": (9, 6)}), SHAPES)

    @pytest.mark.parametrize("rank", [0, 1, 4])
    def test_another_rank_than_the_plans_is_refused_with_both(self, rank):
        refused(arrays(ranks={"dense": rank}), f"dense: rank {rank}, expected 3")

    def test_pruned_ranks_are_allowed_where_the_plan_prunes(self):
        plan = TrainPlan(
            {n: ModulePlan(tuple(range(4)), tuple(range(4))) for n in SHAPES},
            tail=TailPruning(decay=0.5, weight=0.0, min_rank=1),
        )
        for rank in (2, 4):
            read_update(reply(arrays(plan, ranks={"query": rank})), plan, HEAD, SHAPES)
        refused(arrays(plan, ranks={"query": 3}), "query: rank 3, expected 2 or 4", plan)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("part", [0, 1])
    def test_factors_that_are_not_finite_are_refused_with_their_value(self, value, part):
        update = arrays()
        update.modules["dense"][part].flat[3] = value
        name, size = (("lora_A", 27), ("lora_B", 18))[part]
        refused(update, rf"dense: {name}: 1 of {size} numbers are not finite, the first is {value}")

    def test_shapes_are_looked_at_before_values(self):
        update = arrays(ranks={"dense": 1})
        update.modules["query"][0][:] = np.nan
        refused(update, "dense: rank 1")

    def test_a_head_of_another_shape_is_refused_with_both(self):
        refused(arrays(head={"weight": (7, 3), "bias": (3,)}), r"head weight: .*\(7, 3\).*\(3, 7\)")

    def test_a_head_that_was_not_asked_for_is_refused(self):
        refused(arrays(), "head: 0 missing .*, 2 not asked for", head={})

    def test_a_head_that_is_missing_is_refused(self):
        refused(arrays(head={"weight": (3, 7)}), r"head: 1 missing \['bias'\]")

    def test_a_head_that_is_not_finite_is_refused(self):
        update = arrays()
        update.head["bias"][1] = np.nan
        refused(update, "head bias: 1 of 3 numbers are not finite")

    def test_another_dtype_is_refused(self):
        message = reply()
        record = message.content.array_records["arrays"]
        record["factors"] = Array(record["factors"].numpy().astype(np.float64))
        with pytest.raises(ReplyError, match=r"float64.*expected float32"):
            read_update(message, PLAN, HEAD, SHAPES)


class TestScores:
    def test_too_few_or_too_many_are_refused_with_both_numbers(self):
        for count in (1, 3):
            scores = {"query": np.ones(count, np.float32), "dense": np.ones(3, np.float32)}
            refused(arrays(scores=scores), f"query: {count} importance scores, expected 2")

    def test_a_module_without_scores_is_refused(self):
        refused(
            arrays(scores={"query": np.ones(2, np.float32)}),
            r"importance: 1 missing \['dense'\]",
        )

    def test_unrequested_scores_are_rejected(self):
        plan = TrainPlan(PLAN.modules)
        scores = {"query": np.ones(2, np.float32)}
        refused(arrays(plan, scores=scores), r"importance: .* 1 not asked for \['query'\]", plan)

    def test_scores_of_unknown_modules_are_refused(self):
        scores = arrays().importance | {"key": np.ones(2, np.float32)}
        refused(arrays(scores=scores), r"not asked for \['key'\]")

    def test_a_probe_scores_everything_that_is_held(self):
        plan = TrainPlan(PLAN.modules, importance="smoothed", probe_batches=2)
        four = {name: np.ones(4, np.float32) for name in SHAPES}
        read_update(reply(arrays(plan, scores=four)), plan, HEAD, SHAPES)
        refused(arrays(plan), "query: 2 importance scores, expected 4", plan)

    def test_a_module_that_trains_nothing_may_be_named_or_not(self):
        modules = dict(PLAN.modules) | {"query": ModulePlan((0, 1), ())}
        plan = TrainPlan(modules, importance="smoothed")
        named = {"query": np.zeros(0, np.float32), "dense": np.ones(3, np.float32)}
        for scores in (named, {"dense": named["dense"]}):
            read_update(reply(arrays(plan, scores=scores)), plan, HEAD, SHAPES)

    @pytest.mark.parametrize(
        ("value", "match"), [(-0.5, "-0.5, expected at least 0"), (np.nan, "1 of 3.*nan")]
    )
    def test_scores_that_are_negative_or_not_finite_are_refused(self, value, match):
        update = arrays()
        update.importance["dense"][2] = value
        refused(update, f"dense: importance.*{match}")


class TestMetrics:
    def test_all_are_returned_by_name(self):
        assert read_metrics(reply(), PROFILE) == METRIC_VALUES

    @pytest.mark.parametrize("examples", [0, -1, 32, 2.5, 31.0, math.nan, math.inf, [3]])
    def test_impossible_numbers_of_examples_are_refused(self, examples):
        with pytest.raises(ReplyError, match="num-examples"):
            read_metrics(reply(num_examples=examples), PROFILE)

    def test_a_truth_value_is_no_number_of_examples(self):
        content = reply().content
        # Flower's own check would not let it in.
        content.metric_records[METRICS].__dict__["_data"]["num-examples"] = True
        with pytest.raises(ReplyError, match="num-examples is True, expected a whole number"):
            read_metrics(message(content), PROFILE)

    def test_the_expected_range_is_the_profiles(self):
        with pytest.raises(
            ReplyError, match="num-examples is 32, expected a whole number, 1 to 31"
        ):
            read_metrics(reply(num_examples=32), PROFILE)

    def test_missing_examples_are_refused(self):
        content = RecordDict({METRICS: MetricRecord({"loss": 0.5})})
        with pytest.raises(ReplyError, match="num-examples is None"):
            read_metrics(message(content), PROFILE)

    @pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, [0.3, 0.4], 10**400])
    def test_a_metric_that_is_no_finite_number_is_refused(self, loss):
        with pytest.raises(ReplyError, match=r"metric .loss. is .*, expected a finite number"):
            read_metrics(reply(loss=loss), PROFILE)

    def test_an_error_is_refused_with_its_reason_on_one_short_line(self):
        with server_identity():
            request = Message(RecordDict(), 2, MessageType.TRAIN)
            request.metadata.__dict__["_message_id"] = "m"
            failed = Message(Error(3, "disk\nfull " + "x" * 5000), reply_to=request)
        with pytest.raises(ReplyError, match=r"^disk full x+\.\.\.$") as caught:
            read_metrics(failed, PROFILE)
        assert len(str(caught.value)) <= 300

    @pytest.mark.parametrize("reason", [None, "", " \n"])
    def test_an_error_without_a_reason_is_refused_with_its_code(self, reason):
        with server_identity():
            request = Message(RecordDict(), 2, MessageType.TRAIN)
            request.metadata.__dict__["_message_id"] = "m"
            failed = Message(Error(3, reason), reply_to=request)
        with pytest.raises(ReplyError, match="error 3"):
            read_metrics(failed, PROFILE)


WRONG_CONTENTS = {
    "nothing": lambda c: c.clear(),
    "no layout": lambda c: c.pop("layout"),
    "no arrays": lambda c: c.pop("arrays"),
    "layout as arrays": lambda c: c.update(layout=ArrayRecord()),
    "arrays as metrics": lambda c: c.update(arrays=MetricRecord({"factors": 1.0})),
    "metrics as config": lambda c: c.update(metrics=ConfigRecord({"num-examples": 3})),
    "empty layout": lambda c: c.update(layout=ConfigRecord()),
    "layout as text": lambda c: c["layout"].update(layout="{}"),
    "layout of noise": lambda c: c["layout"].update(layout=b"noise"),
    "a list as layout": lambda c: write_layout(c, []),
    "ranks are no list": lambda c: change_layout(c, ranks=3),
    "ranks are words": lambda c: change_layout(c, ranks=["2", "3"]),
    "ranks are fractions": lambda c: change_layout(c, ranks=[2.0, 3.0]),
    "widths are words": lambda c: change_layout(c, in_features=["5", "9"]),
    "names are numbers": lambda c: change_layout(c, modules=[1, 2]),
    "names are repeated": lambda c: change_layout(c, modules=["query", "query"]),
    "scores are words": lambda c: change_layout(c, num_scores=["2", "3"]),
    "scored names are numbers": lambda c: change_layout(c, scored_modules=[1, 2]),
    "no score counts": lambda c: change_layout(c, num_scores=[]),
    "factors gone": lambda c: c["arrays"].pop("factors"),
    "scores gone": lambda c: c["layout"].pop("scores"),
    "scores cut off": lambda c: c["layout"].update(scores=c["layout"]["scores"][:-4]),
    "factors are no numbers": lambda c: c["arrays"].update(factors=Array(np.array(["a", "b"]))),
    "a head without a name": lambda c: c["arrays"].update({"head/": Array(np.ones(3, np.float32))}),
    "bytes that are no array": lambda c: c["arrays"].update(
        factors=Array("float32", (37,), "numpy.ndarray", b"\x93NUMPY")
    ),
}


@pytest.mark.parametrize("kind", WRONG_CONTENTS)
def test_whatever_is_wrong_inside_a_reply_is_a_reply_error(kind):
    wrong = reply()
    WRONG_CONTENTS[kind](wrong.content)
    with pytest.raises(ReplyError):
        read_metrics(wrong, PROFILE)
        read_update(wrong, PLAN, HEAD, SHAPES)


def test_names_from_a_node_cannot_break_or_flood_the_log():
    update = arrays(shapes=SHAPES | {"x\ny" * 9999: (4, 3)})
    with pytest.raises(ReplyError, match="not asked for") as caught:
        read_update(reply(update), PLAN, HEAD, SHAPES)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


class TestSize:
    @pytest.mark.parametrize("probe_batches", [0, 2])
    @pytest.mark.parametrize("layers", [1, 300])
    @pytest.mark.parametrize("rank", [0, 1, 8])
    def test_honest_replies_pass_whatever_their_rank(self, rank, layers, probe_batches):
        shapes = {
            f"base_model.model.encoder.layer.{i}.attention.self.query": (17, 5)
            for i in range(layers)
        }
        held = tuple(range(8))
        plan = TrainPlan(
            {n: ModulePlan(held, held[:rank]) for n in shapes},
            importance="smoothed",
            probe_batches=probe_batches,
        )
        count = 8 if probe_batches else rank
        scores = {n: np.ones(count, np.float32) for n in shapes}
        honest = reply(arrays(plan, shapes, scores=scores))
        check_size(message_bytes(honest), plan, HEAD, shapes)

    def test_a_reply_of_the_global_rank_is_too_large_for_a_weak_clients_plan(self):
        shapes = {"query": (384, 1536)}
        plan = TrainPlan({"query": ModulePlan((0, 1), (0, 1))})
        update = arrays(plan, shapes, ranks={"query": 64})
        size = message_bytes(reply(update))
        with pytest.raises(ReplyError, match=rf"{size} bytes, expected at most \d+ for this plan"):
            check_size(size, plan, HEAD, shapes)

    def test_the_bound_is_half_more_than_the_payload_and_a_constant(self):
        shapes = {"query": (3000, 5000)}
        plan = TrainPlan({"query": ModulePlan((0, 1, 2), (0, 2))}, importance="smoothed")
        payload = 4 * (2 * 8000 + 3 * 7 + 3 + 2)
        constant = 64 * 1024 + 3 * 256 + 2 * len("queryweightbias")
        check_size(int(1.5 * payload) + constant, plan, HEAD, shapes)
        with pytest.raises(ReplyError):
            check_size(int(1.5 * payload) + constant + 1, plan, HEAD, shapes)


class TestOutliers:
    SIZES = (1.0, 1.2, 0.4, 0.9, 1.1)

    def test_honest_updates_pass(self):
        assert norm_outliers(self.SIZES, [10, 25, 7, 31, 12], 10.0) == [""] * 5

    def test_one_or_two_scaled_updates_of_five_are_named_with_the_bound(self):
        for wrong in ({3}, {0, 3}):
            sizes = [s * 1e6 if k in wrong else s for k, s in enumerate(self.SIZES)]
            reasons = norm_outliers(sizes, [10, 25, 7, 31, 12], 10.0)
            assert {k for k, reason in enumerate(reasons) if reason} == wrong
            assert "change of 9e+05 per number, expected at most" in reasons[3]

    def test_four_updates_are_not_judged(self):
        assert norm_outliers([1.0, 1.0, 1.0, 1e6], [10, 25, 7, 31], 10.0) == [""] * 4

    def test_a_client_with_more_examples_may_move_as_many_times_further(self):
        sizes, examples = [1.0] * 6 + [20.0], [16] * 6 + [320]
        assert norm_outliers(sizes, examples, 10.0) == [""] * 7
        assert norm_outliers(sizes, [16] * 7, 10.0)[6]

    def test_a_client_with_fewer_examples_may_move_as_far_as_the_others(self):
        assert norm_outliers([1.0] * 7, [160] * 6 + [1], 10.0) == [""] * 7

    def test_a_claim_of_very_many_examples_buys_little(self):
        sizes, examples = [1.0] * 6 + [1e6], [16] * 6 + [10**12]
        assert norm_outliers(sizes, examples, 10.0)[6]

    @given(st.permutations(range(7)))
    def test_the_order_does_not_matter(self, order):
        sizes, examples = [1.0, 1.2, 0.4, 0.9, 1.1, 1e3, 30.0], [10, 25, 7, 31, 12, 9, 400]
        reasons = norm_outliers(sizes, examples, 10.0)
        shuffled = norm_outliers([sizes[k] for k in order], [examples[k] for k in order], 10.0)
        assert shuffled == [reasons[k] for k in order]

    def test_a_round_without_updates_has_none(self):
        assert norm_outliers([], [], 10.0) == []


class TestImportanceOfAClient:
    HONEST = (0.2, 7.0, 0.9, 3.0, 40.0)

    def test_scores_that_differ_as_data_do_are_fine(self):
        assert importance_outliers(self.HONEST) == [""] * 5

    def test_a_claim_beyond_all_proportion_is_named(self):
        reasons = importance_outliers([*self.HONEST, 1e30])
        assert reasons[:5] == [""] * 5
        assert reasons[5].startswith("importance of 1e+30 in the mean, expected at most 5e+03")

    def test_those_that_measured_nothing_do_not_count(self):
        assert importance_outliers([0.0, 0.0, 1.0, 1.0, 1e30]) == [""] * 5


@pytest.mark.parametrize(
    ("name", "value"),
    [("accuracy", 1.5), ("macro-f1", -0.1), ("token-accuracy", 1e9), ("loss", -1.0), ("loss", 1e9)],
)
def test_metrics_that_cannot_be_are_refused(name, value):
    with pytest.raises(ReplyError, match=f"metric '{name}' is .*, expected 0 to"):
        read_metrics(reply(**{name: value}), PROFILE)
