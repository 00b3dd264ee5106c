"""`scripts/deploy_local.sh`, by its Python module: what it starts, leaves behind and returns."""

import json
import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from deployment_factories import NAMES

from hafl_app.deployment.deploy_local import main

ROOT = Path(__file__).parents[2]
_MARK = "HAFL_TEST_MARK"


@pytest.fixture
def mark():
    """Return the value of a variable by which all processes of a test are found."""
    value = uuid.uuid4().hex
    yield value
    for process in marked(value):
        process.kill()


def marked(value):
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == value:
                found.append(process)
    return found


def deploy(mark, *arguments):
    # Under a shell's background job SIGINT is ignored, and children would inherit that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "hafl_app.deployment", *arguments],
            cwd=ROOT,
            env=os.environ | {_MARK: mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_node_runs_one_round_and_nothing_stays(tmp_path, mark):
    process = deploy(
        *(mark, "--nodes", "1", "--ranks", "4", "--output", str(tmp_path / "out")),
        *("--", "federation.num_rounds=1"),
    )
    log, _ = process.communicate(timeout=590)

    assert process.returncode == 0, log
    assert "Online: node-0 (rank 4)" in log
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "metrics.jsonl").is_file()
    logs = {path.name for path in (tmp_path / "out" / "logs").iterdir()}
    assert logs == {"superlink.log", "fence.log", "node-0.log", "fleet.json"}
    assert not marked(mark)


@pytest.mark.deploy
@pytest.mark.timeout(900)
class TestStopping:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interruption_in_a_round_leaves_nothing_behind(self, tmp_path, mark, number):
        process = deploy(
            *(mark, "--nodes", "1", "--output", str(tmp_path)),
            *("--", "federation.num_rounds=500"),
        )
        for line in process.stdout:
            if " 1/500" in line:  # told when the round is over, so the next one is going on
                break
        commands = [" ".join(p.cmdline()) for p in marked(mark)]
        assert any("flwr-serverapp" in command for command in commands)
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(timeout=120) == 130
        assert not marked(mark)

    def test_a_run_that_fails_is_an_exit_code(self, tmp_path, mark):
        process = deploy(
            *(mark, "--nodes", "1", "--output", str(tmp_path), "--"),
            *("client.learning_rate=1e30", "client.max_grad_norm=0"),
        )
        log, _ = process.communicate(timeout=800)
        assert process.returncode == 1
        assert "error: FlowerRunError: the run is finished:failed" in log
        assert not marked(mark)


def rows(number):
    return "".join(f"text {i} about {i % 2},class-{i % 2}\n" for i in range(number))


@pytest.mark.deploy
@pytest.mark.timeout(900)
def test_nodes_train_on_their_own_files_and_a_broken_one_is_left_out(tmp_path, mark):
    files = [tmp_path / f"{name}.csv" for name in ("a", "b", "broken")]
    for path, text in zip(files, (rows(20), rows(30), "nothing,here\n1,2\n"), strict=True):
        path.write_text("text,label\n" * (path.stem != "broken") + text)
    out = tmp_path / "out"
    data = [word for path in files for word in ("--data", str(path))]

    process = deploy(mark, "--nodes", "3", *data, "--output", str(out))
    log, _ = process.communicate(timeout=880)

    assert process.returncode == 0, log
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert len(summary["left_out"]) == 1
    clients = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = {c["rank"]: c["num_examples"] for c in clients if c["kind"] == "client"}
    assert trained == {2: 18, 4: 27}  # a tenth is held out
    assert not marked(mark)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--nodes", "0"], "--nodes 0: expected at least 1"),
            (["--nodes", "3", "--ranks", "2,4"], "--ranks 2,4: expected 3 numbers"),
            (["--nodes", "2", "--ranks", "2,0"], "--ranks 2,0: expected 2 numbers"),
            (["--nodes", "2", "--data", "a.csv"], "--data: 1 files for 2 nodes"),
            (["--nodes", "1", "--data", "/nowhere/a.csv"], "--data /nowhere/a.csv: no such file"),
        ],
    )
    def test_a_mistake_is_reported_before_anything_starts(self, capsys, arguments, expected):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1

    def test_credentials_need_the_keys_of_all_nodes(self, credentials, capsys):
        assert NAMES[0] != "node-0"
        assert main(["--nodes", "1", "--credentials", str(credentials.folder)]) == 2
        assert "node-0.key is missing" in capsys.readouterr().err
