"""Terms of a node's operator: the least privacy of a run, and the fields that leave the node."""

import shlex

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from running import TINY

from hafl_app.client.node_config import NodeConfigError
from hafl_app.client.permissions import NotAllowedError
from hafl_app.client.terms import FIELDS, Terms
from hafl_app.client_app import app
from hafl_app.config.compose import compose
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_choice import ComponentChoice
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.wire.faults import Fault, fault_of
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import METRICS, AdapterArrays, adapter_content, plan_record

LOCAL = "privacy=local_dp strategy=zero_padding "
CENTRAL = "privacy=central_dp strategy=zero_padding "
PLAIN = "strategy=zero_padding federation.fraction_evaluate=0 "


def terms(words):
    """Read terms as a node config with these keys."""
    return Terms.of(dict(word.split("=", 1) for word in shlex.split(words)))


def check(words, overrides):
    terms(words).check(compose(shlex.split(overrides)))


class TestLeastPrivacy:
    @pytest.mark.parametrize(
        ("words", "overrides"),
        [
            ("", "strategy=hafl"),
            ("least-privacy=none", "strategy=hafl"),
            ("least-privacy=central_dp", CENTRAL),
            ("least-privacy=central_dp", LOCAL),
            ("least-privacy=local_dp", LOCAL),
            (
                "least-privacy=local_dp max-clip-norm=0.5 min-noise-multiplier=2",
                LOCAL + "privacy.clip_norm=0.5 privacy.noise_multiplier=2",
            ),
        ],
    )
    def test_a_run_that_offers_as_much_is_served(self, words, overrides):
        check(words, overrides)

    @pytest.mark.parametrize(
        ("words", "overrides", "setting", "key"),
        [
            ("least-privacy=central_dp", PLAIN, "privacy.kind=none", "least-privacy"),
            ("least-privacy=local_dp", PLAIN, "privacy.kind=none", "least-privacy"),
            ("least-privacy=local_dp", CENTRAL, "privacy.kind=central_dp", "least-privacy"),
            # With a seed the server computes the noise and takes it off again.
            (
                "least-privacy=local_dp",
                LOCAL + "privacy.noise_seed=3",
                "privacy.noise_seed",
                "least-privacy",
            ),
            (
                "least-privacy=local_dp max-clip-norm=0.5",
                LOCAL + "privacy.clip_norm=0.51",
                "privacy.clip_norm=0.51",
                "max-clip-norm",
            ),
            (
                "least-privacy=central_dp min-noise-multiplier=2",
                CENTRAL + "privacy.noise_multiplier=1.99",
                "privacy.noise_multiplier=1.99",
                "min-noise-multiplier",
            ),
        ],
    )
    def test_one_that_offers_less_is_refused_by_setting_and_key(
        self, words, overrides, setting, key
    ):
        with pytest.raises(NotAllowedError) as caught:
            check(words, overrides)

        assert setting in str(caught.value)
        assert f"({key} in its --node-config)" in str(caught.value)
        assert "\n" not in str(caught.value)


class TestMalformedTerms:
    """A node must not answer on other terms than its operator meant."""

    @pytest.mark.parametrize(
        ("words", "key"),
        [
            ("least-privacy=local", "least-privacy"),
            ("least-privacy=", "least-privacy"),
            ("max-clip-norm=1", "max-clip-norm"),
            ("min-noise-multiplier=1", "min-noise-multiplier"),
            ("least-privacy=local_dp max-clip-norm=0", "max-clip-norm"),
            ("least-privacy=local_dp max-clip-norm=nan", "max-clip-norm"),
            ("least-privacy=local_dp min-noise-multiplier=much", "min-noise-multiplier"),
            ("share=labels,secret", "share"),
            ("share=all", "share"),
        ],
    )
    def test_are_refused_by_key_without_their_value(self, words, key):
        with pytest.raises(NodeConfigError, match=f"^{key} in this node's") as caught:
            terms(words)

        assert "secret" not in str(caught.value)


class TestShare:
    def test_everything_leaves_unless_it_is_said(self):
        assert terms("").shared == set(FIELDS)
        assert terms("share=").shared == set()
        assert terms("share=' labels , times '").shared == {"labels", "times"}

    def test_a_run_that_evaluates_on_nodes_needs_scores(self):
        with pytest.raises(NotAllowedError, match=r"fraction_evaluate=1\.0 needs the scores of"):
            check("share=labels", "strategy=zero_padding")
        check("share=scores", "strategy=zero_padding")
        check("share=labels", PLAIN)

    def test_a_head_in_closed_form_needs_sums(self):
        closed = PLAIN + "model.head=closed_form "
        with pytest.raises(NotAllowedError, match=r"model\.head=closed_form needs the sums of"):
            check("share=labels,scores", closed)
        check("share=sums", closed)
        with pytest.raises(NotAllowedError, match=r"temperature_by=clients needs the scores of"):
            check("share=sums", closed + "model.closed_form.temperature_by=clients")

    def test_control_variates_need_the_number_of_steps(self):
        asked = PLAIN + "federation.scaffold=true"
        with pytest.raises(NotAllowedError, match=r"scaffold=true needs the times of this node"):
            check("share=losses", asked)
        check("share=times", asked)

    @pytest.mark.parametrize(
        ("overrides", "needs"),
        [
            ("strategy=hafl", True),
            ("strategy=hafl strategy.source=server", False),
            ("strategy=hafl strategy.selection=random", False),
            ("strategy=hafl strategy.importance=magnitude", False),
            ("strategy=flexlora", False),
            ("strategy=lora_a2", True),
        ],
    )
    def test_a_method_that_measures_importance_needs_it(self, overrides, needs):
        asked = f"{overrides} federation.fraction_evaluate=0"
        check("share=importance", asked)
        if not needs:
            check("share=", asked)
            return
        with pytest.raises(NotAllowedError, match="the strategy needs the importance of"):
            check("share=", asked)

    def test_so_does_a_plan_whatever_the_settings_said(self):
        modules = {"dense": ModulePlan((0, 1), (0,))}
        terms("share=").check_plan(TrainPlan(modules))
        with pytest.raises(NotAllowedError, match="the plan needs the importance of this node"):
            terms("share=losses").check_plan(TrainPlan(modules, importance="smoothed"))
        chosen = {"dense": ModulePlan((0, 1), (0, 1), budget=1)}
        rule = ComponentChoice("contribution", "model")
        with pytest.raises(NotAllowedError, match="the plan needs the importance of this node"):
            terms("share=losses").check_plan(TrainPlan(chosen, choice=rule))


class Node:
    """A node with a partition, asked directly."""

    def __init__(self, node_config, *overrides):
        self.overrides = (*TINY, *overrides)
        run_config = {"overrides": shlex.join(self.overrides)}
        self.grid = InProcessGrid(app, 5, run_config)
        self.grid._contexts[1].node_config |= node_config

    def ask(self, kind, content=None):
        with server_identity():
            (reply,) = self.grid.send_and_receive([Message(content or RecordDict(), 1, kind)])
        return reply

    def work(self, kind, importance="none"):
        """Ask for two of three components of each module."""
        settings = build.settings_of_run({"overrides": shlex.join(self.overrides)})
        shapes = adapter_shapes(build.model_spec(settings, 20))
        adapter = AdapterArrays(
            {n: _factors(shape.in_features, shape.out_features) for n, shape in shapes.items()}
        )
        modules = {name: ModulePlan((0, 1, 2), (0, 2)) for name in shapes}
        plan = TrainPlan(modules, importance=importance)
        config = ConfigRecord({"server-round": 1})
        return self.ask(kind, adapter_content(adapter, plan=plan_record(plan), config=config))


def _factors(in_features, out_features):
    rng = np.random.default_rng(in_features)
    return (
        rng.normal(size=(3, in_features)).astype(np.float32),
        rng.normal(size=(out_features, 3)).astype(np.float32),
    )


class TestOnANode:
    def test_a_run_with_too_little_privacy_is_refused_at_the_query(self):
        reply = Node({"least-privacy": "local_dp"}, "strategy=zero_padding").ask(MessageType.QUERY)

        assert fault_of(reply) is Fault.REFUSED
        assert reply.error.reason.startswith("privacy.kind=none: this node insists on local_dp")

    def test_so_is_a_training_request(self):
        node = Node({"least-privacy": "local_dp"}, "strategy=zero_padding")

        assert fault_of(node.work(MessageType.TRAIN)) is Fault.REFUSED

    def test_a_withheld_device_is_unknown(self):
        overrides = ("strategy=zero_padding", "federation.fraction_evaluate=0")

        told = NodeProfile.from_reply(Node({}, *overrides).ask(MessageType.QUERY))
        kept = NodeProfile.from_reply(Node({"share": ""}, *overrides).ask(MessageType.QUERY))

        assert (told.device, kept.device) == ("cpu", "unknown")
        assert told.memory_total_mb > 0 < len(told.torch_version)
        assert (kept.device_name, kept.torch_version, kept.cuda_version) == ("", "", "")
        assert (kept.memory_total_mb, kept.memory_free_mb) == (0, 0)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("share", "names"),
        [
            ("", set()),
            ("losses", {"loss"}),
            ("times", {"steps", "seconds", "probe-seconds", "out-of-time"}),
            ("device", {"peak-memory-mb", "micro-batch-size"}),
        ],
    )
    def test_of_a_training_only_shared_metrics_leave(self, share, names):
        overrides = ("strategy=zero_padding", "federation.fraction_evaluate=0")

        reply = Node({"share": share}, *overrides).work(MessageType.TRAIN)

        assert set(reply.content[METRICS]) == {"num-examples"} | names

    @pytest.mark.slow
    def test_a_server_that_asks_for_more_than_its_settings_is_refused(self):
        node = Node({"share": "losses"}, "strategy=zero_padding", "federation.fraction_evaluate=0")

        trained = node.work(MessageType.TRAIN, importance="smoothed")
        scored = node.work(MessageType.EVALUATE)

        assert fault_of(trained) is fault_of(scored) is Fault.REFUSED
        assert "the plan needs the importance of this node" in trained.error.reason
        assert "evaluation needs the scores of this node" in scored.error.reason
