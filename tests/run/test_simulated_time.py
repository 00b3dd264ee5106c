"""Simulated time of whole runs: deterministic, partial rounds, and nothing without a clock."""

import math

import pytest
import torch
from flwr.app import Error, Message
from flwr.superlink.grid import HttpGrid
from running import records, run_tiny, tampering
from safetensors.torch import load_file

from hafl_app.config.compose import SettingsError, compose
from hafl_app.engines.in_process import run_federation
from hafl_app.metrics import ACCURACY, PERPLEXITY
from hafl_app.run import build
from hafl_app.run.simulated_time import check_memory, check_nodes, time_to
from hafl_app.tracking.base import RoundRecord
from hafl_app.wire.node_profile import NodeProfile

# Ranks 2, 2, 4, 8, 8 of the five clients: two phones, a Jetson and two laptops.
MIXED = ("devices=mixed", "federation.fraction_evaluate=0")
# A phone so slow that nothing else counts.
SLOW_PHONE = ("devices.classes.phone.peak_flops=1e7", "devices.deadline_s=2")


def phones_fail(request, reply):
    is_phone = request.metadata.dst_node_id <= 2  # partitions 0 and 1
    return Message(Error(1000, "broken on purpose"), reply_to=request) if is_phone else reply


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
class TestRuns:
    def test_rounds_and_clients_have_seconds_the_same_each_time(self, tmp_path):
        jitter = "devices.jitter=0.2"
        summaries = [run_tiny(tmp_path / name, *MIXED, jitter) for name in ("one", "two")]

        rounds, again = (records(tmp_path / name, "round") for name in ("one", "two"))
        clients = records(tmp_path / "one", "client")
        assert [r["simulated_seconds"] for r in rounds] == [r["simulated_seconds"] for r in again]
        assert rounds[0]["simulated_seconds"] == 0
        for one in rounds[1:]:
            same = [c for c in clients if c["server_round"] == one["server_round"]]
            assert one["simulated_seconds"] == max(c["simulated_seconds"] for c in same)
        # the phones are the slowest, at the lowest rank and thus with the fewest FLOPs
        first = clients[:5]
        assert [c["rank"] for c in first] == [2, 2, 4, 8, 8]
        assert min(c["simulated_seconds"] for c in first[:2]) > first[4]["simulated_seconds"]
        assert summaries[0]["simulated_time"] == summaries[1]["simulated_time"]
        assert summaries[0]["simulated_time"]["clients"] == {
            "phone": 2,
            "jetson": 1,
            "laptop_gpu": 2,
        }
        assert math.isclose(
            summaries[0]["simulated_time"]["seconds"], sum(r["simulated_seconds"] for r in rounds)
        )

    def test_the_clock_changes_nothing_else(self, tmp_path):
        run_tiny(tmp_path / "with", *MIXED)
        summary = run_tiny(tmp_path / "without", "federation.fraction_evaluate=0")

        ours, plain = adapter(tmp_path / "with"), adapter(tmp_path / "without")
        assert all(torch.equal(tensor, plain[name]) for name, tensor in ours.items())
        assert "simulated_time" not in summary
        text = (tmp_path / "without" / "metrics.jsonl").read_text()
        assert "simulated" not in text
        assert "flops" not in text

    @pytest.mark.parametrize("streaming", [(), ("federation.streaming=true",)], ids=str)
    def test_who_misses_the_deadline_is_left_out_of_the_mean(self, tmp_path, streaming):
        more = ("federation.max_norm_ratio=null", "federation.num_rounds=1", *streaming)
        summary = run_tiny(tmp_path / "out", *MIXED, *SLOW_PHONE, *more)

        last = records(tmp_path / "out", "round")[-1]
        late = [c for c in records(tmp_path / "out", "client") if c["error"]]
        assert (last["replies"], last["failures"], last["simulated_seconds"]) == (3, 2, 2)
        assert [c["rank"] for c in late] == [2, 2]
        assert all("missed devices.deadline_s=2" in c["error"] for c in late)
        assert all(c["simulated_seconds"] > 2 and c["bytes_up"] for c in late)
        assert summary["simulated_time"]["partial_rounds"] == 1
        # As if the phones had failed, and not as if they had been in time.
        run_tiny(tmp_path / "all", *MIXED, *more)
        run_tiny(tmp_path / "failing", *MIXED, *more, app=tampering(phones_fail))
        ours, whole, partial = (adapter(tmp_path / n) for n in ("out", "all", "failing"))
        assert all(torch.equal(tensor, partial[name]) for name, tensor in ours.items())
        assert any(not torch.equal(tensor, whole[name]) for name, tensor in ours.items())

    def test_a_round_that_nobody_reaches_in_time_is_repeated_and_takes_as_long_again(
        self, tmp_path
    ):
        with pytest.raises(RuntimeError, match=r"missed devices.deadline_s=0.001"):
            run_tiny(
                tmp_path / "out", *MIXED, "devices.deadline_s=0.001", "federation.max_retries=1"
            )

    def test_evaluation_by_the_clients_takes_time_too(self, tmp_path):
        for name, fraction in (("without", 0), ("with", 1)):
            more = ("federation.num_rounds=1", f"federation.fraction_evaluate={fraction}")
            run_tiny(tmp_path / name, "devices=mixed", *more)

        without, evaluated = (
            records(tmp_path / name, "round")[-1]["simulated_seconds"]
            for name in ("without", "with")
        )
        assert without < evaluated < 5 * without  # nor as long as for a client that is silent

    def test_resumed_it_goes_on(self, tmp_path):
        whole = run_tiny(tmp_path / "whole", *MIXED)
        folder = tmp_path / "part"
        run_tiny(folder, *MIXED, "federation.num_rounds=1")
        resumed = run_tiny(folder, *MIXED, f"resume={folder}")

        assert resumed["simulated_time"] == whole["simulated_time"]

    def test_the_target_is_in_the_summary(self, tmp_path):
        more = ("devices.target=0", "federation.test_every=1")
        summary = run_tiny(tmp_path / "out", *MIXED, *more)
        reached = {"target": 0, "phase": "test", "round": 0, "seconds": 0}
        assert summary["simulated_time"]["to_target"] == reached

    def test_images_have_a_clock(self, tmp_path):
        few = ("dataset.max_examples=60", "dataset.max_test_examples=20", "partition=iid")
        more = ("federation.num_clients=3", "federation.num_rounds=1", "client.local_epochs=1")
        run_federation(["experiment=digits", *few, *more, *MIXED, f"output_dir={tmp_path}"])
        assert records(tmp_path, "round")[-1]["simulated_seconds"] > 0


def record(server_round, seconds, **metrics):
    named = {k.replace("_", "/"): v for k, v in metrics.items()}
    return RoundRecord(server_round, 1.0, 0.1, 0, 0, 1, 0, named, simulated_seconds=seconds)


class TestTimeTo:
    def test_is_when_every_rounds_test_score_gets_there_first(self):
        rounds = [
            record(0, 0, test_accuracy=0.1),
            record(1, 5, test_accuracy=0.4, validation_accuracy=0.9),
            record(2, 7, test_accuracy=0.6),
            record(3, 7, test_accuracy=0.7),
        ]
        expected = {"target": 0.6, "phase": "test", "round": 2, "seconds": 12}
        assert time_to(0.6, rounds, ACCURACY) == expected

    def test_goes_by_validation_where_not_every_round_is_tested(self):
        rounds = [
            record(1, 5, validation_accuracy=0.5),
            record(2, 7),
            record(3, 9, test_accuracy=0.6, validation_accuracy=0.8),
        ]
        expected = {"target": 0.7, "phase": "validation", "round": 3, "seconds": 21}
        assert time_to(0.7, rounds, ACCURACY) == expected

    def test_of_a_perplexity_is_when_it_has_sunk(self):
        rounds = [record(1, 5, test_perplexity=30.0), record(2, 5, test_perplexity=20.0)]
        assert time_to(25.0, rounds, PERPLEXITY)["seconds"] == 10

    def test_may_be_never(self):
        reached = time_to(0.9, [record(1, 5, test_accuracy=0.5)], ACCURACY)
        assert (reached["round"], reached["seconds"]) == (None, None)


class TestRefused:
    def test_a_deadline_of_real_nodes(self):
        real = HttpGrid.__new__(HttpGrid)
        check_nodes(real, compose(["devices=mixed"]))  # is only predicted
        with pytest.raises(SettingsError, match=r"devices.deadline_s=3: the nodes are real"):
            check_nodes(real, compose(["devices=mixed", "devices.deadline_s=3"]))

    def test_a_device_with_too_little_memory(self):
        settings = compose(
            [
                *("devices=mixed", "model=tiny_random", "dataset.max_length=16"),
                "devices.classes.phone.memory_mb=0.1",
            ]
        )
        jetson, phone = (NodeProfile(0, 2, rank, 10, "cpu") for rank in (4, 2))

        check_memory(settings, [jetson], 3)
        with pytest.raises(SettingsError, match=r"phone.memory_mb=0.1: a training step at rank 2"):
            check_memory(settings, [jetson, phone], 3)


class TestAssignment:
    def test_shares_are_dealt_out_whatever_the_ranks(self):
        given = ("devices=mixed", "devices.assign=share", "federation.num_clients=10")
        mixed, same = compose(given), compose([*given, "ranks=homogeneous"])
        names = [
            [build.device_name(settings, k, rank) for k in range(10)]
            for settings, rank in ((mixed, 2), (same, 8))
        ]
        assert names[0] == names[1]
        expected = {"phone": 3, "jetson": 3, "laptop_gpu": 2, "server_gpu": 2}
        assert {name: names[0].count(name) for name in names[0]} == expected

    def test_they_follow_the_order_of_the_ranks(self):
        given = ("devices=mixed", "devices.assign=share", "ranks=two_to_sixteen")
        settings = compose([*given, "lora.max_rank=16", "ranks.order=shuffled", "seed=5"])
        ranks = build.client_ranks(settings, 10)
        device = {2: "phone", 4: "jetson", 8: "laptop_gpu", 16: "server_gpu"}
        assert [build.device_name(settings, k, 2) for k in range(10)] == [device[r] for r in ranks]
