"""Runs that fold replies in as they arrive: the same results, and what they refuse."""

from itertools import chain

import pytest
import torch
from driving import serves_mixed_ranks, strategy_named
from flwr.app import Error, Message
from running import ReorderedGrid, records, run_tiny, tampering
from safetensors.torch import load_file

from hafl_app.config.compose import SettingsError
from hafl_app.config.files import CONF
from hafl_app.server.rounds import RoundFailedError
from hafl_app.strategies.hafl import Hafl

pytestmark = pytest.mark.slow

# The bound on norms compares the replies of a round, so a streaming run has none.
BASE = ("federation.max_norm_ratio=null", "federation.alone_clients_per_rank=0")
STREAMING = (*BASE, "federation.streaming=true", "federation.stream_buffer=2")
METHODS = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))


def adapter_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_results(one, other):
    left, right = adapter_of(one), adapter_of(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert records(one, "client") == records(other, "client")
    rounds, streamed = records(one, "round"), records(other, "round")
    shares, estimates = ([line.pop("influence") for line in each] for each in (rounds, streamed))
    assert rounds == streamed
    for exact, estimate in zip(chain(*shares), chain(*estimates), strict=True):
        assert estimate.pop("influence") == pytest.approx(exact.pop("influence"), abs=0.2)
        assert estimate == exact


def test_a_reply_is_folded_before_the_buffer_runs_over(monkeypatch, tmp_path):
    events = []
    accumulate = Hafl.accumulate
    monkeypatch.setattr(
        Hafl, "accumulate", lambda *args: (events.append("fold"), accumulate(*args))[1]
    )

    def trained(request, reply):
        events.append("train")
        return reply

    run_tiny(tmp_path / "s", *STREAMING, "federation.num_rounds=1", app=tampering(trained))

    assert events.count("train") == events.count("fold") == 5
    ahead = [events[:i].count("train") - events[:i].count("fold") for i in range(len(events))]
    assert max(ahead) == 2


def assert_same_products(one, other):
    left, right = products_of(one), products_of(other)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-5)


def products_of(folder):
    tensors = adapter_of(folder)
    return {
        name: tensors[name.replace("lora_A", "lora_B")] @ lora_A
        for name, lora_A in tensors.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_out_the_same(method, tmp_path):
    ranks = [] if serves_mixed_ranks(method) else ["ranks=homogeneous"]
    at_once, streamed = tmp_path / "a", tmp_path / "s"

    run_tiny(at_once, f"strategy={method}", *ranks, *BASE)
    run_tiny(streamed, f"strategy={method}", *ranks, *STREAMING, grid_type=ReorderedGrid)

    if strategy_named(method).traits.homogeneous_form != "factor mean":
        # Products are summed densely, in another order.
        assert_same_products(at_once, streamed)
    else:
        assert_same_results(at_once, streamed)


def test_central_privacy_comes_out_the_same(tmp_path):
    private = ("strategy=zero_padding", "privacy=central_dp", "privacy.noise_seed=1")
    at_once, streamed = tmp_path / "a", tmp_path / "s"

    run_tiny(at_once, *private, *BASE)
    run_tiny(streamed, *private, *STREAMING)

    assert_same_results(at_once, streamed)


def answering_with_errors(*partitions):
    def change(request, reply):
        if request.metadata.dst_node_id - 1 in partitions:
            return Message(Error(1000, "broken on purpose"), reply_to=request)
        return reply

    return tampering(change)


def test_bad_replies_are_left_out_the_same_way(tmp_path):
    app, at_once, streamed = answering_with_errors(1, 4), tmp_path / "a", tmp_path / "s"

    run_tiny(at_once, *BASE, app=app)
    run_tiny(streamed, *STREAMING, app=app)

    assert_same_results(at_once, streamed)
    refused = [c["partition_id"] for c in records(streamed, "client") if c["error"]]
    assert set(refused) == {1, 4}


@pytest.mark.parametrize("method", ["hafl", "hetlora"])
def test_a_round_with_too_few_replies_changes_nothing(method, tmp_path):
    few = ("federation.min_replies=4", "federation.max_retries=0", f"strategy={method}")

    with pytest.raises(RoundFailedError, match="3 of 5 clients count"):
        run_tiny(tmp_path / "s", *few, *STREAMING, app=answering_with_errors(1, 4))


@pytest.mark.parametrize(
    ("setting", "off"),
    [
        ("robust=median", "robust=none"),
        ("max_norm_ratio=5.0", "max_norm_ratio=null"),
        ("clip_ratio=2.0", "clip_ratio=null"),
    ],
)
def test_what_needs_a_whole_round_is_refused(setting, off, tmp_path):
    with pytest.raises(SettingsError, match=f"streaming=true needs federation.{off}, not "):
        run_tiny(tmp_path / "s", *STREAMING, f"federation.{setting}")
