"""Whole federations whose uploads have the bits that an uplink carries."""

import json
import logging

import pytest
import torch
from running import LONE, records, run_tiny
from safetensors.torch import load_file

from hafl_app.engines.in_process import InProcessGrid

pytestmark = pytest.mark.slow
ONCE = (
    "federation.alone_clients_per_rank=0",
    "federation.fraction_evaluate=0",
    "model.head=frozen",
)


def run(folder, *overrides, **how):
    """Rates of 0.65 to 2.7 Mbit/s; here 16 bits of everything take 0.03 to 0.3 Mbit."""
    return run_tiny(folder, "strategy=haflq", *ONCE, *overrides, **how)


def factors_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


class Remembering(InProcessGrid):
    last: InProcessGrid

    def __init__(self, *arguments, **values):
        super().__init__(*arguments, **values)
        Remembering.last = self


def test_less_time_means_fewer_bytes_and_all_replies_count(tmp_path):
    sizes = {}
    for seconds in (1, 0.05, 0.01, 1e-9):
        summary = run(tmp_path / str(seconds), f"strategy.upload_seconds={seconds}")
        traffic = summary["bytes"]["train"]
        assert traffic["refused"] == 0
        sizes[seconds] = traffic["up"]

    whole = run_tiny(tmp_path / "hafl", "strategy=hafl", *ONCE)["bytes"]["train"]["up"]
    assert whole > sizes[1] > sizes[0.05] > sizes[0.01] > sizes[1e-9]
    before, after = (tmp_path / name for name in ("1e-09", "0.05"))
    assert any((factors_of(after)[n] != t).any() for n, t in factors_of(before).items())


def test_a_run_can_be_repeated(tmp_path):
    for name in "ab":
        run(tmp_path / name, "strategy.upload_seconds=0.02")

    again = factors_of(tmp_path / "b")
    assert all(torch.equal(t, again[n]) for n, t in factors_of(tmp_path / "a").items())
    assert records(tmp_path / "a", "client") == records(tmp_path / "b", "client")


def test_clients_keep_what_had_no_bits_and_a_resumed_run_gives_it_back(tmp_path):
    shorter = ("strategy.upload_seconds=0.02",)
    run(tmp_path / "whole", *shorter, "federation.num_rounds=3")
    run(tmp_path / "cut", *shorter, "federation.num_rounds=2", grid_type=Remembering)
    kept = Remembering.last.client_states()
    run(tmp_path / "cut", *shorter, "federation.num_rounds=3", f"resume={tmp_path / 'cut'}")

    assert {"rounding-errors" in state for state in kept.values()} == {True}
    whole, cut = factors_of(tmp_path / "whole"), factors_of(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


class Forgetful(InProcessGrid):
    client_states = None  # as Flower's own grids


def test_a_run_whose_engine_forgets_says_so(tmp_path, caplog):
    run(tmp_path / "out", "federation.num_rounds=1", grid_type=Forgetful)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "out", f"resume={tmp_path / 'out'}", grid_type=Forgetful)

    assert "federation.upload=mixed: the rounding errors kept by the clients are lost" in (
        caplog.text
    )


class Stating(InProcessGrid):
    """Its nodes' operators state a bandwidth: 2 kbit/s for partition 0, 10 Mbit/s for the rest."""

    def __init__(self, app, num_nodes, run_config):
        configs = [
            {"partition-id": i, "num-partitions": num_nodes, "bandwidth-kbps": 10_000 if i else 2}
            for i in range(num_nodes)
        ]
        super().__init__(app, num_nodes, run_config, configs)


def test_a_stated_bandwidth_goes_before_the_channel(tmp_path):
    run(tmp_path / "stated", grid_type=Stating)

    up = {line["partition_id"]: line["bytes_up"] for line in records(tmp_path / "stated", "client")}
    assert up[0] < up[1] / 3  # of one rank, and next to each other in the channel model
    run(tmp_path / "model")
    up = {line["partition_id"]: line["bytes_up"] for line in records(tmp_path / "model", "client")}
    assert up[0] == pytest.approx(up[1], rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        ("federation.robust=trimmed_mean",),
        ("federation.streaming=true", "federation.max_norm_ratio=null"),
        ("strategy.scheme=truncation", "strategy.scope=model"),
        ("strategy.importance=contribution", "strategy.upgrade=component"),
        ("strategy.probe_batches=1",),
        ("federation.clip_ratio=1",),
    ],
)
def test_goes_with_everything_else(overrides, tmp_path):
    summary = run(tmp_path / "out", *overrides, "strategy.upload_seconds=0.02")
    assert summary["status"] == "finished"
    assert summary["bytes"]["train"]["refused"] == 0
    assert all(torch.isfinite(t).all() for t in factors_of(tmp_path / "out").values())


@pytest.mark.parametrize("privacy", ["local_dp", "central_dp"])
def test_rounding_is_post_processing_under_privacy(privacy, tmp_path):
    run(
        tmp_path / "out",
        *(f"privacy={privacy}", "privacy.noise_seed=5", "federation.max_retries=0"),
        *("strategy.importance=magnitude", "federation.max_norm_ratio=null"),
        "strategy.upload_seconds=0.02",
        grid_type=Remembering,
    )

    states = Remembering.last.client_states().values()
    assert {"rounding-errors" in state for state in states} <= {privacy == "central_dp"}
    assert all(torch.isfinite(t).all() for t in factors_of(tmp_path / "out").values())


def test_clients_that_train_alone_upload_in_float32(tmp_path):
    sizes = {}
    for strategy in ("hafl", "haflq"):
        summary = run_tiny(tmp_path / strategy, LONE, f"strategy={strategy}")
        sizes[strategy] = summary["bytes"]["alone"]["up"]

    assert sizes["haflq"] == sizes["hafl"] > 0


def test_what_is_written_down_can_be_read_again(tmp_path):
    run(tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert "upload: mixed" in (tmp_path / "out" / "config.yaml").read_text()
