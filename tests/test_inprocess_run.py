"""Whole federations in process: what a run leaves behind, and what it survives."""

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, Message, RecordDict
from running import LONE, ReorderedGrid, records, run_tiny, tampering
from safetensors.torch import load_file

from hafl_app.cgroups import usable_cpus
from hafl_app.client import handlers
from hafl_app.server.method import StrategyError
from hafl_app.server.rounds import RoundFailedError
from hafl_app.training import lora_model
from hafl_app.training.adapter_files import load_adapter
from hafl_app.training.evaluate import evaluate
from hafl_app.wire.records import METRICS


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run_tiny(folder, LONE, draws=True)


class TestOutput:
    def test_everything_is_there(self, finished):
        folder, summary = finished
        files = {path.name for path in folder.iterdir()}
        assert files >= {
            "config.yaml",
            "metrics.jsonl",
            "summary.json",
            "clients.json",
            "adapter",
            "adapter-best",
            "curves.png",
        }
        assert summary["status"] == "finished"
        assert summary["versions"]["flwr"].startswith(("1.41.", "1.42."))
        assert [r["server_round"] for r in records(folder, "round")] == [0, 1, 2]
        assert len(records(folder, "client")) == 2 * 5

    def test_bytes_are_those_of_the_messages(self, finished):
        folder, summary = finished
        clients = records(folder, "client")
        train = summary["bytes"]["train"]
        assert train["down"] == sum(c["bytes_down"] for c in clients)
        assert train["up"] == sum(c["bytes_up"] for c in clients)
        # Freezing: every client receives all 8 components, but uploads only its budget's.
        down = {c["rank"]: c["bytes_down"] for c in clients}
        up = {c["rank"]: c["bytes_up"] for c in clients}
        assert up[2] < up[4] < up[8]
        assert max(down.values()) - min(down.values()) < 0.02 * max(down.values())

    def test_the_saved_adapter_scores_the_last_line(self, finished):
        folder, summary = finished
        loaded = load_adapter(folder / "adapter")
        from running import TINY

        from hafl_app.run import build

        text = build.federated_text(build.settings_of_run({"overrides": " ".join(TINY)}), 5)
        assert loaded.label_names == text.label_names
        assert evaluate(loaded.model, text.test).accuracy == summary["final"]["test/accuracy"]

    def test_every_rank_is_compared_with_a_lone_client(self, finished):
        _, summary = finished
        rows = summary["device_ranks"]
        assert [row["rank"] for row in rows] == [2, 4, 8]
        for row in rows:
            assert row["gain"] == pytest.approx(row["federated"] - row["alone"])

    def test_without_asking_no_client_trains_alone(self, tmp_path):
        assert run_tiny(tmp_path / "a")["device_ranks"] == []


class TestDeterminism:
    def test_the_same_seed_gives_the_same_bits(self, finished, tmp_path):
        folder, _ = finished
        run_tiny(tmp_path / "again", LONE)
        assert records(tmp_path / "again", "round") == records(folder, "round")
        assert records(tmp_path / "again", "client") == records(folder, "client")
        first, second = (
            load_file(f / "adapter" / "adapter_model.safetensors")
            for f in (folder, tmp_path / "again")
        )
        assert all(torch.equal(first[k], second[k]) for k in first)

    def test_the_order_of_replies_does_not_matter(self, finished, tmp_path):
        folder, _ = finished
        run_tiny(tmp_path / "reordered", grid_type=ReorderedGrid)
        assert records(tmp_path / "reordered", "round") == records(folder, "round")

    def test_another_seed_gives_another_run(self, finished, tmp_path):
        folder, _ = finished
        run_tiny(tmp_path / "other", "seed=1")
        assert records(tmp_path / "other", "client") != records(folder, "client")

    def test_a_fraction_takes_part(self, tmp_path):
        run_tiny(tmp_path / "some", "federation.fraction_train=0.4")
        partitions = [
            {
                c["partition_id"]
                for c in records(tmp_path / "some", "client")
                if c["server_round"] == r
            }
            for r in (1, 2)
        ]
        assert [len(p) for p in partitions] == [2, 2]


@pytest.mark.slow
class TestHeads:
    @pytest.mark.parametrize("head", ["averaged", "frozen", "local"])
    def test_every_policy_runs(self, tmp_path, head):
        summary = run_tiny(tmp_path / head, f"model.head={head}")
        final = summary["final"]
        assert "clients/accuracy" in final
        assert ("test/accuracy" in final) == (head != "local")
        head_bytes = sum(r["head_bytes_up"] for r in summary["bytes"]["train"]["by_rank"].values())
        assert (head_bytes > 0) == (head == "averaged")

    def test_a_frozen_head_stays_and_is_saved(self, tmp_path):
        run_tiny(tmp_path / "a", "model.head=frozen")
        loaded = load_adapter(tmp_path / "a" / "adapter")
        from running import TINY

        from hafl_app.run import build

        settings = build.settings_of_run({"overrides": " ".join(TINY)})
        initial = build.model(settings, 20).initial_head
        assert all(torch.equal(loaded.model.head_state()[k], initial[k]) for k in initial)


def test_the_base_model_is_loaded_once(tmp_path, monkeypatch):
    calls = []
    load = lora_model.load_base
    monkeypatch.setattr(lora_model, "load_base", lambda *args: calls.append(args) or load(*args))
    lora_model.resident_model.cache_clear()

    run_tiny(tmp_path / "a", LONE)

    assert len(calls) == 1  # for the server, 5 clients, 2 rounds and 3 lone clients


@pytest.mark.slow
class TestFaults:
    def test_a_failing_client_costs_its_reply_and_no_more(self, tmp_path):
        def change(request, reply):
            if request.metadata.dst_node_id == 2:
                raise RuntimeError("disk full")
            return reply

        run_tiny(tmp_path / "a", app=tampering(change))

        rounds = records(tmp_path / "a", "round")
        assert [(r["replies"], r["failures"]) for r in rounds[1:]] == [(4, 1), (4, 1)]
        errors = [c["error"] for c in records(tmp_path / "a", "client") if c["error"]]
        assert errors == ["RuntimeError: disk full"] * 2

    @pytest.mark.parametrize("kind", ["nan", "shape", "examples", "inf-metric"])
    def test_a_bad_reply_is_refused_and_the_rest_counts(self, tmp_path, kind):
        def change(request, reply):
            if request.metadata.dst_node_id != 2:
                return reply
            content = reply.content
            arrays = content.array_records["arrays"]
            flat = np.array(arrays["factors"].numpy())
            if kind == "nan":
                flat[3] = np.nan
                arrays["factors"] = Array(flat)
            elif kind == "shape":
                arrays["factors"] = Array(flat[:-1])
            elif kind == "examples":
                content.metric_records[METRICS]["num-examples"] = 10**9
            else:
                content.metric_records[METRICS]["num-examples"] = math.inf
            return Message(content, reply_to=request)

        run_tiny(tmp_path / "a", "federation.alone_clients_per_rank=0", app=tampering(change))

        rounds = records(tmp_path / "a", "round")
        assert [(r["replies"], r["failures"]) for r in rounds[1:]] == [(4, 1), (4, 1)]
        tensors = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
        assert all(t.isfinite().all() for t in tensors.values())

    def test_a_run_in_which_every_client_failed_is_a_failed_run(self, tmp_path):
        def change(request, reply):
            return Message(RecordDict(), reply_to=request)

        with pytest.raises(RoundFailedError, match="round 1"):
            run_tiny(tmp_path / "a", app=tampering(change))

        summary = json.loads((tmp_path / "a" / "summary.json").read_text())
        assert summary["status"] == "failed"
        assert "round 1" in summary["reason"]

    def test_fedit_refuses_mixed_ranks(self, tmp_path):
        with pytest.raises(StrategyError, match=r"one rank for all clients, got \[2, 4, 8\]"):
            run_tiny(tmp_path / "a", "strategy=fedit")

    def test_fedit_runs_with_one_rank(self, tmp_path):
        summary = run_tiny(
            tmp_path / "a", "strategy=fedit", "ranks=homogeneous", "lora.max_rank=3", LONE
        )
        assert [row["rank"] for row in summary["device_ranks"]] == [3]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["hafl", "zero_padding"])
def test_training_changes_the_global_adapter(tmp_path, strategy):
    run_tiny(tmp_path / "a", f"strategy={strategy}", "federation.alone_clients_per_rank=0")
    tensors = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    assert all(t.abs().sum() > 0 for name, t in tensors.items() if "lora_B" in name)


class TestClientTable:
    def test_planned_bytes_are_close_to_the_measured_ones(self, tmp_path, capsys):
        run_tiny(tmp_path / "a", "federation.alone_clients_per_rank=0")
        table = capsys.readouterr().out
        row = next(line.split() for line in table.splitlines() if line.split()[:2] == ["0", "2"])
        planned_down, planned_up = float(row[3]), float(row[5])  # "0.031 MB" are two words
        client = records(tmp_path / "a", "client")[0]
        assert planned_down <= client["bytes_down"] / 1e6 < planned_down + 0.004
        assert planned_up <= client["bytes_up"] / 1e6 < planned_up + 0.004


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
def test_clients_train_with_the_threads_they_are_given(tmp_path, monkeypatch, num_threads):
    seen = set()
    train = handlers.train_locally

    def spy(*args, **named):
        seen.add(torch.get_num_threads())
        return train(*args, **named)

    monkeypatch.setattr(handlers, "train_locally", spy)
    run_tiny(tmp_path / "a", f"client.num_threads={num_threads}", "federation.num_rounds=1")
    assert seen == {min(num_threads, usable_cpus())}


def test_devices_with_ranks_per_layer_type_are_a_class_of_their_own(tmp_path, capsys):
    tiers = (
        "ranks.tiers=[{rank: 2, share: 1}, {rank: 2, share: 1, rank_pattern: {query: 4}}]",
        "strategy=zero_padding",
    )
    rows = run_tiny(tmp_path / "a", *tiers, LONE)["device_ranks"]
    assert [(row["rank"], row.get("ranks")) for row in rows] == [(2, None), (2, [2, 4])]
    assert "2/4" in capsys.readouterr().out
