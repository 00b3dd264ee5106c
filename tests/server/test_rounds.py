"""Rounds that do not work: repeated, logged, and without a trace in the global state."""

import json
import logging
from collections import Counter

import pytest
import torch
from flwr.app import Error, Message
from running import ReorderedGrid, records, run_tiny, tampering
from safetensors.torch import load_file

from hafl_app.server.method import StrategyError
from hafl_app.server.rounds import RoundFailedError
from hafl_app.strategies.hafl import Hafl
from hafl_app.strategies.hetlora import HetLora
from hafl_app.wire.faults import Fault, error_reply
from hafl_app.wire.records import CONFIG, SERVER_ROUND

pytestmark = pytest.mark.slow  # whole federations


def partition_of(request: Message) -> int:
    return request.metadata.dst_node_id - 1  # in the in-process engine


def round_of(request: Message) -> int:
    return int(request.content.config_records[CONFIG][SERVER_ROUND])


def failing(fails):
    """Return a ClientApp whose training fails where `fails(partition, round, times asked)`."""
    asked = Counter()

    def change(request, reply):
        who = partition_of(request), round_of(request)
        asked[who] += 1
        if fails(*who, asked[who]):
            return Message(Error(1000, "broken on purpose"), reply_to=request)
        return reply

    return tampering(change)


class TestRepeats:
    def test_a_round_with_too_few_replies_is_repeated(self, tmp_path, caplog):
        app = failing(lambda partition, server_round, time: server_round == 1 and time == 1)

        run_tiny(tmp_path / "out", "federation.min_replies=5", app=app)

        rounds = records(tmp_path / "out", "round")
        assert [r["server_round"] for r in rounds] == [0, 1, 2]
        assert (rounds[1]["replies"], rounds[1]["failures"]) == (5, 5)
        line = (
            "0 of 5 clients count, federation.min_replies=5; 5 of 5 failed alike: broken on purpose"
        )
        assert f"{line} (attempt 1 of 3)" in caplog.text

    def test_a_repeat_asks_nodes_that_have_not_failed_in_the_round(self, tmp_path):
        asked = []

        def fails(partition, server_round, time):
            asked.append(partition)
            return len(asked) <= 2

        run_tiny(
            tmp_path / "out",
            *("federation.fraction_train=0.4", "federation.num_rounds=1"),
            app=failing(fails),
        )

        first, second = set(asked[:2]), set(asked[2:4])
        assert len(second) == 2
        assert not first & second

    def test_the_repeated_round_starts_from_the_same_adapter(self, tmp_path):
        app = failing(lambda partition, server_round, time: server_round == 2 and time == 1)
        run_tiny(tmp_path / "whole", "strategy=hetlora")

        run_tiny(tmp_path / "repeated", "strategy=hetlora", "federation.min_replies=2", app=app)

        whole, repeated = (
            load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
            for name in ("whole", "repeated")
        )
        assert all(torch.equal(tensor, repeated[name]) for name, tensor in whole.items())

    def test_in_the_end_the_run_stops_with_the_reason_and_its_checkpoint(self, tmp_path):
        folder = tmp_path / "out"
        app = failing(lambda partition, server_round, time: server_round == 2)

        with pytest.raises(RoundFailedError, match=r"round 2: .* last of 2 attempts"):
            run_tiny(folder, "federation.max_retries=1", app=app)

        assert "round 2" in json.loads((folder / "summary.json").read_text())["reason"]
        run_tiny(tmp_path / "whole")
        run_tiny(folder, "federation.max_retries=1", f"resume={folder}")
        whole, resumed = (
            load_file(f / "adapter" / "adapter_model.safetensors")
            for f in (tmp_path / "whole", folder)
        )
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())

    def test_more_replies_than_clients_are_asked_is_refused_at_once(self, tmp_path):
        with pytest.raises(StrategyError, match=r"min_replies=3: only 2 of 5 clients are asked"):
            run_tiny(tmp_path / "out", "federation.min_replies=3", "federation.fraction_train=0.4")


class TestQuarantine:
    def test_a_node_that_keeps_failing_rests_and_comes_back(self, tmp_path):
        app = failing(lambda partition, server_round, time: partition == 3)

        run_tiny(
            tmp_path / "out",
            *("federation.num_rounds=7", "federation.fraction_evaluate=0"),
            *("federation.quarantine.after=2", "federation.quarantine.rounds=3"),
            app=app,
        )

        tries = [c["server_round"] for c in records(tmp_path / "out", "client") if c["error"]]
        assert tries == [1, 2, 6]  # out in 3, 4 and 5; then one more refusal is enough

    def test_refusals_are_counted_by_rank(self, tmp_path):
        app = failing(lambda partition, server_round, time: partition == 0)

        summary = run_tiny(tmp_path / "out", "federation.quarantine.after=0", app=app)

        assert summary["bytes"]["train"]["refused"] == 2
        assert summary["bytes"]["train"]["by_rank"]["2"]["refused"] == 2
        assert summary["bytes"]["train"]["by_rank"]["8"]["refused"] == 0

    def test_the_log_names_node_partition_and_reason(self, tmp_path, caplog):
        app = failing(lambda partition, server_round, time: partition == 2 and server_round == 2)

        with caplog.at_level(logging.WARNING):
            run_tiny(tmp_path / "out", app=app)

        assert (
            "round 2, node 3 (partition 2): train reply rejected: broken on purpose" in caplog.text
        )


class TestSmallerRank:
    @staticmethod
    def out_of_memory(largest_that_fits):
        def change(request, reply):
            plan_size = int(reply.content.array_records["arrays"]["factors"].shape[0])
            sizes.append((partition_of(request), plan_size))
            if partition_of(request) == 4 and plan_size > largest_that_fits * unit[0]:
                return error_reply(request, Fault.OUT_OF_MEMORY, "no memory left")
            if partition_of(request) == 0:
                unit[0] = plan_size // 2  # partition 0 has rank 2
            return reply

        sizes, unit = [], [1]
        return tampering(change), sizes, unit

    def test_a_node_out_of_memory_gets_half_the_rank_next_round(self, tmp_path, caplog):
        app, sizes, unit = self.out_of_memory(largest_that_fits=2)

        run_tiny(tmp_path / "out", "strategy=zero_padding", "federation.num_rounds=4", app=app)

        assert [s // unit[0] for p, s in sizes if p == 4][:4] == [8, 4, 2, 2]
        assert "node 5 (partition 4) ran out of memory: rank 4 from now on" in caplog.text

    def test_a_method_of_one_rank_keeps_it(self, tmp_path, caplog):
        app, sizes, _ = self.out_of_memory(largest_that_fits=0)

        run_tiny(
            tmp_path / "out", "strategy=fedit", "ranks=homogeneous", "lora.max_rank=4", app=app
        )

        assert len({s for p, s in sizes if p == 4}) == 1
        assert "node 5 keeps its rank" in caplog.text


@pytest.mark.parametrize(("method", "name"), [(HetLora, "hetlora"), (Hafl, "hafl")])
def test_half_a_fold_changes_nothing(method, name, tmp_path, monkeypatch):
    """The fold fails at the fourth of five updates, when three have left their mark."""
    calls = []
    accumulate = method.accumulate

    def breaking(self, state, update):
        calls.append(update.partition_id)
        if len(calls) == 14:
            strategies.append(self)
            raise MemoryError("in the middle of the fold")
        return accumulate(self, state, update)

    strategies = []
    overrides = (f"strategy={name}",)
    if name == "hetlora":
        overrides += ("strategy.decay=0.5", "strategy.tail_weight=10.0")  # prunes in round 2
    run_tiny(tmp_path / "two", *overrides, "federation.num_rounds=2")
    monkeypatch.setattr(method, "accumulate", breaking)

    with pytest.raises(MemoryError):
        run_tiny(tmp_path / "out", *overrides, "federation.num_rounds=3")

    strategy = strategies[0]
    after_two = load_file(tmp_path / "two" / "checkpoints" / "round-00002.safetensors")
    before = {k.removeprefix("tensor/strategy\x1f"): v for k, v in after_two.items()}
    memory = {k: v for k, v in before.items() if k.startswith("memory")}
    assert memory
    now = flat({"memory": strategy.memory()})
    assert now.keys() == memory.keys()
    assert all(torch.equal(now[key], tensor) for key, tensor in memory.items())


def flat(tree, prefix=""):
    leaves = {}
    for name, node in tree.items():
        key = f"{prefix}\x1f{name}" if prefix else name
        leaves |= flat(node, key) if isinstance(node, dict) else {key: node}
    return leaves


def test_second_and_unknown_replies_are_logged_and_ignored(tmp_path, caplog):
    class Doubling(ReorderedGrid):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            return [*replies, *replies[:2]]

    run_tiny(tmp_path / "plain", "federation.alone_clients_per_rank=0")
    run_tiny(tmp_path / "doubled", "federation.alone_clients_per_rank=0", grid_type=Doubling)

    assert records(tmp_path / "plain", "round") == records(tmp_path / "doubled", "round")
    assert caplog.text.count("a second reply") == 2 * 2 * 2  # twice in both phases of two rounds
