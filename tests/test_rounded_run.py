"""Whole federations whose uploads are rounded."""

import json
import logging

import pytest
import torch
from running import LONE, run_tiny
from safetensors.torch import load_file

from hafl_app.engines.in_process import InProcessGrid

pytestmark = pytest.mark.slow
ONCE = ("federation.alone_clients_per_rank=0", "federation.fraction_evaluate=0")


def factors_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def products_of(folder):
    """The dense updates: factors of the same product may differ, in their sign at least."""
    factors = factors_of(folder)
    return torch.cat(
        [
            (factors[name.replace("lora_A", "lora_B")] @ lora_A).flatten()
            for name, lora_A in factors.items()
            if "lora_A" in name
        ]
    )


def distance(one, other):
    return float((products_of(one) - products_of(other)).norm())


@pytest.mark.parametrize("strategy", ["hafl", "hetlora", "flexlora", "zero_padding"])
def test_rounding_saves_bytes_and_hardly_changes_the_adapter(strategy, tmp_path):
    sizes = {}
    for upload in ("fp32", "bf16", "int8"):
        overrides = (f"strategy={strategy}", f"federation.upload={upload}", "model.head=frozen")
        summary = run_tiny(tmp_path / upload, *overrides, *ONCE, "federation.num_rounds=1")
        assert summary["bytes"]["train"]["refused"] == 0
        sizes[upload] = summary["bytes"]["train"]["up"]

    # Layers 32 wide: what is not a number weighs more here than anywhere.
    assert sizes["bf16"] < 0.75 * sizes["fp32"]
    assert sizes["int8"] < 0.85 * sizes["bf16"]
    size = float(products_of(tmp_path / "fp32").norm())
    for upload in ("bf16", "int8"):
        assert 0 < distance(tmp_path / "fp32", tmp_path / upload) < 1e-2 * size


class Remembering(InProcessGrid):
    last: InProcessGrid

    def __init__(self, *arguments, **values):
        super().__init__(*arguments, **values)
        Remembering.last = self


@pytest.mark.parametrize(
    ("overrides", "keeps"),
    [
        (["federation.upload=int8"], True),
        (["federation.upload=int8", "federation.error_feedback=false"], False),
        (["federation.upload=int8", "strategy=flexlora"], False),
        (["federation.upload=fp32"], False),
    ],
)
def test_clients_keep_what_rounding_lost_where_it_has_a_meaning(overrides, keeps, tmp_path):
    run_tiny(tmp_path / "out", *overrides, *ONCE, grid_type=Remembering)

    states = Remembering.last.client_states()
    assert len(states) == 5
    assert {"rounding-errors" in state for state in states.values()} == {keeps}
    if keeps:
        kept = states[0]["rounding-errors"].to_torch_state_dict()
        some = kept["lora_A/encoder.layer.0.attention.self.query"]
        assert some.abs().max() > 0


def test_feedback_changes_later_rounds_and_not_the_first(tmp_path):
    for rounds in (1, 3):
        for feedback in ("true", "false"):
            folder = tmp_path / f"{rounds}-{feedback}"
            run_tiny(
                folder,
                "federation.upload=int8",
                f"federation.error_feedback={feedback}",
                f"federation.num_rounds={rounds}",
                "strategy=zero_padding",
                *ONCE,
            )

    assert distance(tmp_path / "1-true", tmp_path / "1-false") == 0
    assert distance(tmp_path / "3-true", tmp_path / "3-false") > 0


def test_clients_that_train_alone_are_scored_by_what_they_trained(tmp_path):
    sizes = {}
    for upload in ("fp32", "int8"):
        summary = run_tiny(tmp_path / upload, LONE, f"federation.upload={upload}")
        sizes[upload] = summary["bytes"]["alone"]["up"]

    assert sizes["int8"] == sizes["fp32"] > 0


class Forgetful(InProcessGrid):
    client_states = None  # as Flower's own grids


def test_a_run_goes_on_without_what_an_engine_forgot_and_says_so(tmp_path, caplog):
    rounded = ("federation.upload=int8", *ONCE)
    run_tiny(tmp_path / "out", *rounded, "federation.num_rounds=2", grid_type=Forgetful)

    with caplog.at_level(logging.WARNING):
        run_tiny(
            tmp_path / "out",
            *(*rounded, "federation.num_rounds=3", f"resume={tmp_path / 'out'}"),
            grid_type=Forgetful,
        )

    assert "federation.upload=int8: the rounding errors kept by the clients are lost" in (
        caplog.text
    )
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "finished"


def test_rounding_is_post_processing_under_local_privacy(tmp_path):
    private = ("strategy=zero_padding", "privacy=local_dp", "privacy.noise_seed=5")
    off = ("federation.fraction_evaluate=0", "federation.alone_clients_per_rank=0")
    for upload in ("fp32", "int8"):
        run_tiny(
            tmp_path / upload,
            *(*private, *off, "federation.max_retries=0", f"federation.upload={upload}"),
            grid_type=Remembering,
        )
        assert not any("rounding-errors" in s for s in Remembering.last.client_states().values())

    assert distance(tmp_path / "fp32", tmp_path / "int8") > 0
    assert all(torch.isfinite(t).all() for t in factors_of(tmp_path / "int8").values())
