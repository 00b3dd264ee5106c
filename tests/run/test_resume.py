"""A run that goes on equals one that was never interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import LONE, TINY, records, run_tiny
from safetensors.torch import load_file

from hafl_app.config.compose import compose
from hafl_app.config.schema import resumable_settings
from hafl_app.engines.in_process import InProcessGrid
from hafl_app.run.resuming import (
    BaseModelChangedError,
    ResumeError,
    check_resumable,
    load_checkpoint,
)
from hafl_app.server.checkpoint_store import CheckpointStore
from hafl_app.tracking.details import DETAILS_FILE
from hafl_app.training import device as device_module

STRATEGIES = ["zero_padding", "hafl", "hetlora", "flexlora", "flexlora_change", "flora"]
VARIANTS = {
    **{name: (f"strategy={name}",) for name in STRATEGIES},
    "fedit": ("strategy=fedit", "ranks=homogeneous"),
    "truncation": ("strategy=hafl", "strategy.scheme=truncation", "strategy.scope=model"),
    "server's importance": ("strategy=hafl", "strategy.source=server"),
    "rounding errors": ("strategy=hafl", "federation.upload=int8"),
    "local heads, rounded": ("strategy=hafl", "federation.upload=int8", "model.head=local"),
    "local heads": ("strategy=hafl", "model.head=local"),
    "in bf16": ("strategy=hafl", "client.precision=bf16"),
    "partial participation": ("strategy=hafl", "federation.fraction_train=0.5"),
    "central privacy": ("strategy=zero_padding", "privacy=central_dp", "privacy.noise_seed=5"),
    "local privacy": ("strategy=flexlora", "privacy=local_dp", "privacy.noise_seed=5"),
    "moments": ("strategy=hafl", "federation.server_optimizer.kind=yogi", "client.proximal=0.1"),
    "control variates": (
        *("strategy=hafl", "client=sgd", "client.max_grad_norm=0"),
        *("federation.scaffold=true", "federation.fraction_train=0.5"),
    ),
    "falling rates": (
        *("strategy=hafl", "strategy.source=server", "federation.streaming=true"),
        *("federation.max_norm_ratio=null", "client.schedule.kind=cosine"),
        "client.schedule.warmup_rounds=1",
    ),
    "closed-form heads": (
        *("strategy=hafl", "model.head=closed_form", "model.head_refresh_every=2"),
        "model.closed_form.temperature_by=clients",
    ),
    # Prunes in round 2, so that the pruned ranks must come back.
    "pruned ranks": ("strategy=hetlora", "strategy.decay=0.5", "strategy.tail_weight=10.0"),
}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors") | load_file(
        folder / "adapter" / "head.safetensors"
    )


def assert_same_run(one: Path, other: Path) -> None:
    expected, got = adapter(one), adapter(other)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    for kind in ("round", "client"):
        assert records(one, kind) == records(other, kind)
    assert (one / DETAILS_FILE).read_text() == (other / DETAILS_FILE).read_text()
    summaries = [json.loads((f / "summary.json").read_text()) for f in (one, other)]
    for summary in summaries:  # measured anew in every process
        for measured in ("seconds", "seconds_before", "stages"):
            del summary[measured]
        summary.pop("cpu_seconds", None)  # none where the run went on elsewhere
        for node in summary["nodes"]:
            del node["memory_free_mb"]
    assert summaries[0] == summaries[1]


def cut_after(server_round: int, run: Path, folder: Path) -> Path:
    """Copy a run as it would be if it had stopped when this round's checkpoint was written."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("adapter*", "*.json", "*.png"))
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.stem > f"round-{server_round:05d}":
            checkpoint.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("server_round", 0) <= server_round]
    assert len(kept) < len(lines)
    (folder / "metrics.jsonl").write_text("".join(kept))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_goes_on_bit_for_bit(variant, tmp_path):
    overrides = VARIANTS[variant]
    run_tiny(tmp_path / "whole", *overrides, "federation.num_rounds=3")
    cut = cut_after(2, tmp_path / "whole", tmp_path / "cut")

    run_tiny(cut, *overrides, "federation.num_rounds=3", f"resume={cut}")

    assert_same_run(tmp_path / "whole", cut)


@pytest.fixture(scope="module")
def three_rounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    run_tiny(folder, LONE, "federation.num_rounds=3")
    return folder


@pytest.mark.slow
def test_a_finished_run_goes_on_for_more_rounds(three_rounds, stopped):
    run_tiny(stopped, LONE, "federation.num_rounds=3", f"resume={stopped}")

    metrics = stopped / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    (once_last,) = (r for r in rows if r["kind"] == "round" and r["server_round"] == 2)
    for name in [name for name in once_last["metrics"] if name.startswith("test/")]:
        del once_last["metrics"][name]  # scored when round 2 was the last
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_same_run(three_rounds, stopped)


@pytest.mark.slow
def test_a_schedule_over_other_rounds_than_before_says_so(tmp_path, caplog):
    overrides = ("client.schedule.kind=linear", f"resume={tmp_path / 'out'}")
    run_tiny(tmp_path / "out", overrides[0])
    run_tiny(tmp_path / "out", *overrides)
    assert "now falls over" not in caplog.text

    run_tiny(tmp_path / "out", *overrides, "federation.num_rounds=3")

    assert (
        "client.schedule.kind=linear now falls over 3 rounds instead of 2: round 3 has a learning "
        "rate of 0.001; the rounds before it are not repeated"
    ) in caplog.text
    rates = [r["metrics"].get("schedule/learning_rate") for r in records(tmp_path / "out", "round")]
    assert rates == [None, pytest.approx(3e-3), pytest.approx(1.5e-3), pytest.approx(1e-3)]


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    run_tiny(folder, LONE)
    return folder


@pytest.fixture
def stopped(two_rounds, tmp_path):
    folder = tmp_path / "out"
    subprocess.run(["cp", "-r", str(two_rounds), str(folder)], check=True)
    return folder


class TestSettings:
    def test_a_changed_setting_is_refused_by_name(self, stopped):
        with pytest.raises(ResumeError, match=r"client.learning_rate=0.01: .* has 0.003"):
            run_tiny(stopped, "client.learning_rate=0.01", f"resume={stopped}")

    def test_another_machines_precision_is_refused(self, stopped, monkeypatch):
        assert json.loads((stopped / "summary.json").read_text())["precision"] == "fp32"
        monkeypatch.setattr(device_module, "_multiplies_bf16", lambda device: True)

        with pytest.raises(ResumeError) as caught:
            run_tiny(stopped, f"resume={stopped}", "federation.num_rounds=3")

        assert str(caught.value) == (
            "client.precision=auto: server computed in fp32 in the run to resume and would now "
            "compute in bf16 on this machine (cpu); resume with client.precision=fp32"
        )

    def test_the_precision_that_was_chosen_may_be_named(self, stopped, monkeypatch):
        checkpoint = load_checkpoint(stopped)
        settings = compose([*TINY, "federation.alone_clients_per_rank=0"])

        def named(precision):
            client = replace(settings.client, precision=precision)
            return replace(settings, client=client)

        assert checkpoint.state["precisions"] == dict.fromkeys(("server", *"01234"), "fp32")
        then = checkpoint.state["settings"]
        then["output_dir"], then["federation"]["alone_clients_per_rank"] = None, 0
        check_resumable(checkpoint, named("fp32"))
        with pytest.raises(ResumeError, match=r"client.precision=bf16: .* has auto"):
            check_resumable(checkpoint, named("bf16"))

    def test_another_method_is_refused(self, stopped):
        with pytest.raises(ResumeError, match=r"strategy.*FlexLora: .* has .*Hafl"):
            run_tiny(stopped, "strategy=flexlora", f"resume={stopped}")

    def test_fewer_rounds_than_are_done_are_refused(self, stopped):
        with pytest.raises(ResumeError, match=r"num_rounds=1: 2 rounds are already done"):
            run_tiny(stopped, "federation.num_rounds=1", f"resume={stopped}")

    def test_a_refused_resume_leaves_the_run_as_it_was(self, stopped):
        before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}

        with pytest.raises(ResumeError):
            run_tiny(stopped, "seed=9", f"resume={stopped}")

        changed = [p.name for p, data in before.items() if p.read_bytes() != data]
        assert changed == []

    def test_a_folder_without_a_run_is_refused(self, tmp_path):
        with pytest.raises(ResumeError, match="no checkpoint there"):
            run_tiny(tmp_path, f"resume={tmp_path}")


@pytest.mark.slow
class TestWhatIsKept:
    def test_the_last_two_checkpoints_stay(self, three_rounds):
        names = sorted(p.name for p in (three_rounds / "checkpoints").iterdir())
        assert names == ["round-00002.safetensors", "round-00003.safetensors"]

    def test_a_new_run_forgets_those_of_one_that_never_trained(self, stopped):
        (stopped / "summary.json").write_text('{"status": "failed"}')
        first, second = sorted((stopped / "checkpoints").iterdir())
        second.unlink()
        first.rename(first.with_name("round-00000.safetensors"))

        run_tiny(stopped, "federation.num_rounds=1", "seed=5", "federation.checkpoint_every=0")

        assert not list((stopped / "checkpoints").iterdir())

    def test_tensors_keep_their_names_in_the_file(self, two_rounds):
        """Or the runs of an older version could not go on."""
        paths = [name.split("\x1f") for name in load_checkpoint(two_rounds).tensors]

        module = "encoder.layer.0.attention.self.query"
        for path in (["strategy", "adapter"], ["report", "best"]):
            for factor in ("lora_A", "lora_B"):
                assert [*path, "modules", module, factor] in paths
            assert [*path, "head", "bias"] in paths
        assert ["strategy", "memory", "scores", module] in paths

    def test_none_are_written_if_none_are_wanted(self, tmp_path):
        run_tiny(tmp_path / "out", "federation.checkpoint_every=0")

        assert not (tmp_path / "out" / "checkpoints").exists()

    def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(self, stopped, three_rounds):
        newest = stopped / "checkpoints" / "round-00002.safetensors"
        data = bytearray(newest.read_bytes())
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)

        run_tiny(stopped, LONE, "federation.num_rounds=3", f"resume={stopped}")

        assert_same_run(three_rounds, stopped)

    def test_local_heads_that_the_engine_forgets_are_refused_by_name(self, tmp_path):
        class Forgetful(InProcessGrid):
            client_states = None  # as Flower's own grids

        run_tiny(tmp_path / "out", "model.head=local", grid_type=Forgetful)

        with pytest.raises(ResumeError, match=r"model.head=local: each client keeps its own head"):
            run_tiny(tmp_path / "out", "model.head=local", f"resume={tmp_path / 'out'}")


PHASES = ["training", "fold", "evaluation", "trackers", "checkpoint", "rename", "results"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return the folder of federations that were killed in each phase, and how they ended."""
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).parents[1] / "helpers" / "killed_run.py"
    command = [sys.executable, script, folder, *TINY, LONE, "federation.num_rounds=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return folder, json.loads((folder / "ended.json").read_text()), process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_goes_on_after_kill_9(phase, killed, three_rounds):
    folder, ended, log = killed
    assert ended[phase] == -signal.SIGKILL, log[-2000:]

    resume = f"resume={folder / phase}"
    run_tiny(folder / phase, LONE, "federation.num_rounds=3", resume)

    assert_same_run(three_rounds, folder / phase)


class TestOldNames:
    """Runs of a version in which settings had other names."""

    @pytest.fixture
    def of_an_older_version(self, tmp_path):
        folder = tmp_path / "old"
        run_tiny(folder, *self.OVERRIDES)
        checkpoint = load_checkpoint(folder)
        settings = checkpoint.state["settings"]
        settings["model"]["quantisation"] = settings["model"].pop("quantization")
        settings["strategy"]["regulariser"] = settings["strategy"].pop("regularizer")
        overrides = ["model.quantisation=bf16", "strategy.regulariser=false"]
        state = {**checkpoint.state, "settings": settings, "overrides": overrides}
        CheckpointStore(folder / "checkpoints").save(
            checkpoint.server_round, checkpoint.tensors, state
        )
        return folder

    OVERRIDES = ("strategy=hetlora", "strategy.regularizer=false", "model.quantization=bf16")

    def test_are_read_as_the_new_ones(self, of_an_older_version):
        state = load_checkpoint(of_an_older_version).state
        assert state["overrides"] == ["model.quantization=bf16", "strategy.regularizer=false"]
        assert state["settings"]["model"]["quantization"] == "bf16"

        more = (*self.OVERRIDES, "federation.num_rounds=3", f"resume={of_an_older_version}")
        assert run_tiny(of_an_older_version, *more)["status"] == "finished"

    def test_a_setting_that_the_run_never_had_is_refused(self, stopped):
        checkpoint = load_checkpoint(stopped)
        del checkpoint.state["settings"]["client"]["optimizer"]

        with pytest.raises(ResumeError, match=r"client.optimizer=adamw: .* version without this"):
            check_resumable(checkpoint, compose(list(TINY)))

    def test_a_changed_value_is_still_refused(self, of_an_older_version):
        changed = ("strategy=hetlora", "model.quantization=bf16", f"resume={of_an_older_version}")
        with pytest.raises(ResumeError, match=r"strategy.regularizer=True: .* has False"):
            run_tiny(of_an_older_version, *changed)


def test_what_may_change_is_declared_by_the_fields():
    assert {
        "output_dir",
        "resume",
        "engine",
        "name",
        "tags",
        "devices.target",
        "tracking.tensorboard",
        "tracking.mlflow",
        "tracking.trackio",
        "tracking.wandb",
        "tracking.project",
        "tracking.entity",
        "tracking.mode",
        "tracking.uri",
        "client.device",
        "client.gradient_checkpointing",
        "privacy.max_epsilon",
        "federation.num_rounds",
        "federation.checkpoint_every",
        "federation.round_timeout_s",
        "federation.start_timeout_s",
        "federation.min_replies",
        "federation.max_retries",
        "federation.server_threads",
        "federation.client_cpus",
        "federation.client_gpus",
        "federation.ray_address",
        "federation.central_evaluation",
        "federation.evaluate_every",
        "federation.test_every",
        "federation.early_stopping.patience",
        "federation.early_stopping.min_delta",
        "federation.generate_examples",
        "federation.generate_tokens",
        "federation.generate_on_clients",
        "federation.generate_seconds",
        "federation.watch_prompts",
        "federation.watch_tokens",
        "federation.fraction_evaluate",
        "federation.alone_clients_per_rank",
        "federation.alone_at_max_rank",
        "federation.cohort",
        "federation.score_device_ranks",
    } == resumable_settings()


@pytest.mark.slow
class TestBaseModel:
    @pytest.fixture
    def hashes(self, monkeypatch):
        """The hashes of the base model's files, one after another; the last one stays."""
        found = ["first"]
        next_hash = lambda _: found.pop(0) if len(found) > 1 else found[0]  # noqa: E731
        monkeypatch.setattr("hafl_app.training.base_files.BaseFiles.fingerprint", next_hash)
        return found

    def test_another_one_than_before_is_refused(self, tmp_path, hashes):
        folder = tmp_path / "out"
        run_tiny(folder, "federation.num_rounds=1")
        hashes[:] = ["other"]
        with pytest.raises(ResumeError, match="its files are not those that the run to resume"):
            run_tiny(folder, f"resume={folder}")
        hashes[:] = ["first"]
        run_tiny(folder, f"resume={folder}")

    def test_one_that_changes_between_rounds_ends_the_run_at_its_last_checkpoint(
        self, tmp_path, hashes
    ):
        hashes[:] = ["first", "first", "first", "other"]  # at the start, after rounds 0, 1 and 2
        with pytest.raises(BaseModelChangedError, match="changed before the end of round 2"):
            run_tiny(tmp_path / "out")
        assert load_checkpoint(tmp_path / "out").server_round == 1
