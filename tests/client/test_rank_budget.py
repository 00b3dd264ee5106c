"""Rank budget of a node: its operator's setting, its memory, its tier, in this order."""

from dataclasses import replace

import pytest
from flwr.app import MessageType
from node_factories import context, request
from running import TINY

from hafl_app.client import rank_budget as budget
from hafl_app.client.handlers import query
from hafl_app.client.node_config import NodeConfigError
from hafl_app.client.permissions import own_machine
from hafl_app.client.rank_budget import NodeLimits, rank_budget
from hafl_app.config.compose import SettingsError, compose
from hafl_app.config.schema import RankTier
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.training.settings import TrainOptions
from hafl_app.training.step_memory import StepMemory
from hafl_app.training.task import DeviceMemoryError
from hafl_app.wire.faults import Fault, fault_of
from hafl_app.wire.node_profile import NodeProfile

# 100 MB at rank 1, and 20 MB more for each further one: on the CPU 650 MB go to the process, and
# tensors take 2.7 times their size.
STEP = StepMemory("cpu", weights=0, lowest=100 * 10**6, highest=240 * 10**6, max_rank=8)
TIER = RankTier(rank=5, share=1.0, rank_pattern={"output.dense": 3})
PLAN = TrainPlan({"dense": ModulePlan((0, 1), (0,))}, local_epochs=2)


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setattr(build, "step_memory", lambda settings, num_labels: STEP)
    return compose(
        ["ranks=from_memory", "model=tiny_random", "client.device=cpu", "dataset.max_length=64"]
    )


def limited(settings, **ranks):
    return replace(settings, ranks=replace(settings.ranks, **ranks))


class TestLimits:
    def test_numbers_come_as_numbers_or_as_text(self):
        config = {"rank": "4", "memory-mb": 2000, "max-steps": 7, "max-seconds": "2.5"}

        assert NodeLimits.of(config) == NodeLimits(4, 2000, 7, 2.5)
        assert NodeLimits.of({"partition-id": 0}) == NodeLimits()
        assert NodeLimits.of({"max-answers": "0"}).max_answers == 0

    @pytest.mark.parametrize("key", ["rank", "memory-mb", "max-steps", "max-seconds"])
    @pytest.mark.parametrize("value", ["many", "", 0, -3, "-1", True, "nan", "inf", "1e400"])
    def test_anything_else_is_refused_by_name(self, key, value):
        with pytest.raises(NodeConfigError, match=f"^{key} in .*: expected") as caught:
            NodeLimits.of({key: value})
        assert caught.value.details == f"it is '{value}'"

    @pytest.mark.parametrize(
        ("of_plan", "of_node", "smaller"),
        [(0, None, 0), (9, None, 9), (0, 4, 4), (9, 4, 4), (3, 4, 3)],
    )
    def test_the_smaller_number_of_steps_wins(self, of_plan, of_node, smaller):
        plan = NodeLimits(max_steps=of_node).limit_plan(replace(PLAN, max_steps=of_plan))

        assert plan == replace(PLAN, max_steps=smaller)

    @pytest.mark.parametrize(
        ("of_run", "of_node", "smaller"),
        [(0.0, None, 0.0), (9.0, None, 9.0), (0.0, 4.5, 4.5), (9.0, 4.5, 4.5), (3.0, 4.5, 3.0)],
    )
    def test_the_shorter_time_wins(self, of_run, of_node, smaller):
        options = TrainOptions(max_seconds=of_run)

        limited = NodeLimits(max_seconds=of_node).limit_options(options, PLAN, local_epochs=2)

        assert limited == TrainOptions(max_seconds=smaller)

    def test_several_rounds_at_once_have_the_time_of_several(self):
        lone, options = replace(PLAN, local_epochs=6), TrainOptions(max_seconds=10.0)

        assert NodeLimits().limit_options(options, lone, 2).max_seconds == 30.0
        # but a device's own limit is one of each training
        assert NodeLimits(max_seconds=12.0).limit_options(options, lone, 2).max_seconds == 12.0


class TestOrder:
    def test_the_operator_goes_before_memory_and_tier(self, settings):
        assert rank_budget(settings, NodeLimits(rank=3, memory_mb=1), TIER, 5) == RankTier(rank=3)

    def test_no_run_asks_for_more_than_its_largest_rank(self, settings):
        assert rank_budget(settings, NodeLimits(rank=64), TIER, 5).rank == 8

    def test_memory_goes_before_the_tier_but_not_above_it(self, settings):
        small, large = (
            rank_budget(settings, NodeLimits(memory_mb=mb), TIER, 5) for mb in (1180, 10**6)
        )

        assert (small, large) == (RankTier(rank=3), RankTier(rank=5))

    def test_without_either_the_tier_counts(self, settings):
        tiers = limited(settings, source="tiers")

        assert rank_budget(tiers, NodeLimits(memory_mb=1), TIER, 5) is TIER
        with pytest.raises(SettingsError, match="needs rank in its --node-config"):
            rank_budget(tiers, NodeLimits(), None, 5)

    def test_a_node_without_a_tier_may_have_all(self, settings):
        assert rank_budget(settings, NodeLimits(memory_mb=10**6), None, 5).rank == 8


class TestMemory:
    # needed_mb is 650 + 2.7 * (100 + 20 * (rank - 1))
    @pytest.mark.parametrize(
        ("memory_mb", "margin", "rank"),
        [
            (921, 0.0, 1),
            (973, 0.0, 1),
            (975, 0.0, 2),
            (1299, 0.0, 8),
            (1299, 0.1, 5),
            (2598, 0.5, 8),
        ],
    )
    def test_the_margin_stays_free(self, settings, memory_mb, margin, rank):
        limits = NodeLimits(memory_mb=memory_mb)

        chosen = rank_budget(limited(settings, memory_margin=margin), limits, None, 5)

        assert chosen.rank == rank

    def test_the_node_goes_before_the_setting_and_the_setting_before_the_machine(
        self, settings, monkeypatch
    ):
        monkeypatch.setattr(budget, "usable_memory_mb", lambda device: 921 / 0.9)
        free = rank_budget(settings, NodeLimits(), None, 5).rank
        stated = limited(settings, memory_limit_mb=10**6)

        assert free == 1
        assert rank_budget(stated, NodeLimits(), None, 5).rank == 8
        assert rank_budget(stated, NodeLimits(memory_mb=1340), None, 5).rank == 6

    def test_a_gpu_cannot_be_stated_larger_than_it_is(self, settings, monkeypatch):
        monkeypatch.setattr(budget, "resolve_device", lambda name: _Cuda)
        monkeypatch.setattr(budget, "describe_device", lambda device: "cuda: NVIDIA L4")
        monkeypatch.setattr(budget, "usable_memory_mb", lambda device: 900.0)

        with pytest.raises(DeviceMemoryError, match=r"NVIDIA L4: rank 1 needs 920 MB.*810 MB are"):
            rank_budget(settings, NodeLimits(memory_mb=10**6), None, 5)

    def test_too_little_for_rank_one_says_what_there_is(self, settings):
        with pytest.raises(DeviceMemoryError) as caught:
            rank_budget(settings, NodeLimits(memory_mb=500), None, 5)

        assert str(caught.value) == (
            "cpu: rank 1 needs 920 MB at client.batch_size=32 and dataset.max_length=64, and "
            "450 MB are usable"
        )


class _Cuda:
    type = "cuda"


class TestQuery:
    """The whole way: settings, count, cache, profile."""

    @pytest.fixture(autouse=True)
    def caches(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HAFL_CACHE", str(tmp_path))

    def ask(self, *overrides, **node_config):
        run_config = {"overrides": " ".join([*TINY, *overrides])}
        with own_machine():
            node = context(
                {k.replace("_", "-"): v for k, v in node_config.items()}, run_config=run_config
            )
            return query(request(MessageType.QUERY), node)

    def test_a_node_says_its_rank_and_its_device(self, tmp_path):
        profile = NodeProfile.from_reply(self.ask("ranks=from_memory", memory_mb=4000))

        assert profile.rank == 8
        assert profile.device == "cpu"
        assert profile.device_name
        assert 0 < profile.memory_free_mb < profile.memory_total_mb
        assert profile.torch_version.startswith("2.")
        assert len(list((tmp_path / "memory").glob("*.json"))) == 1

    def test_one_that_cannot_train_rank_one_refuses_in_its_own_words(self):
        reply = self.ask("ranks=from_memory", memory_mb=300)

        assert fault_of(reply) is Fault.OUT_OF_MEMORY
        assert "rank 1 needs" in reply.error.reason
        assert "270 MB are usable" in reply.error.reason

    def test_a_budget_that_is_no_number_is_refused(self):
        reply = self.ask(rank="eight")

        assert fault_of(reply) is Fault.BAD_REQUEST
        assert "rank in this node's --node-config: expected a whole number" in reply.error.reason
        assert "eight" not in reply.error.reason
