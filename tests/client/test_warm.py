"""Requests to a worker: retried once, keyed by name and code, with what its node permits."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from node_factories import context, request

from hafl_app.client.permissions import OWN_MACHINE
from hafl_app.client.warm_worker import ask as warm
from hafl_app.client.warm_worker.ask import (
    NoWorkerError,
    WorkerDiedError,
    WorkerFailedError,
    ask_worker,
    code_hash,
)
from hafl_app.client.warm_worker.options import WorkerOptions
from hafl_app.client.warm_worker.ray_workers import connected
from hafl_app.client.warm_worker.worker import Answer

OPTIONS = WorkerOptions(port=6390, name="node-7")


class FakeWorkers:
    """Dies the given number of times, then answers."""

    def __init__(self, deaths=0):
        self.deaths = deaths
        self.asked = []

    def ask(self, key, options, message, context, permitting):
        self.asked.append((key, dict(permitting)))
        if len(self.asked) <= self.deaths:
            raise WorkerDiedError("the process was killed")
        state = RecordDict({"kept": ConfigRecord({"by": "worker"})})
        return Answer(Message(RecordDict(), reply_to=message), state, ("INFO hafl_app.x: told",))


@pytest.mark.parametrize("deaths", [0, 1])
def test_a_worker_that_died_is_asked_once_more(deaths):
    workers, asked_for = FakeWorkers(deaths), request()

    reply = ask_worker(workers, OPTIONS, asked_for, context())

    assert reply.has_content()
    assert len(workers.asked) == deaths + 1


def test_one_that_dies_again_is_an_error_with_a_reason():
    workers = FakeWorkers(deaths=2)

    with pytest.raises(WorkerFailedError, match="died twice"):
        ask_worker(workers, OPTIONS, request(), context())
    assert len(workers.asked) == 2


def test_what_the_node_keeps_and_what_was_logged_come_back(capsys):
    node = context()

    ask_worker(FakeWorkers(), OPTIONS, request(), node)

    assert node.state["kept"]["by"] == "worker"
    assert "INFO hafl_app.x: told" in capsys.readouterr().err


def test_a_worker_is_told_what_this_processs_environment_permits(monkeypatch):
    for name, value in OWN_MACHINE.items():
        monkeypatch.setenv(name, value)
    workers = FakeWorkers()

    ask_worker(workers, OPTIONS, request(), context())

    assert workers.asked[0][1] == OWN_MACHINE


def test_other_code_is_another_worker(tmp_path, monkeypatch):
    (tmp_path / "hafl_app").mkdir()
    module = tmp_path / "hafl_app" / "module.py"
    module.write_text("one = 1\n")
    monkeypatch.setattr(warm, "APP_FOLDER", tmp_path)
    workers, before = FakeWorkers(), code_hash(tmp_path)

    ask_worker(workers, OPTIONS, request(), context())
    module.write_text("one = 2\n")
    ask_worker(workers, OPTIONS, request(), context())

    first, second = (key for key, _ in workers.asked)
    assert first == f"node-7/{before}"
    assert second == f"node-7/{code_hash(tmp_path)}" != first


def test_files_that_change_places_are_other_code(tmp_path):
    folders = []
    for name in ("a", "b"):
        package = tmp_path / name / "hafl_app"
        package.mkdir(parents=True)
        (package / f"{name}.py").write_text("x = 1\n")
        folders.append(package.parent)

    assert code_hash(folders[0]) != code_hash(folders[1])


@pytest.mark.parametrize("token", [True, False])
def test_where_nothing_listens_there_is_no_worker(token, tmp_path, monkeypatch):
    monkeypatch.setenv("HAFL_NODE_STATE", str(tmp_path))
    if token:
        (tmp_path / "ray-9").mkdir()
        (tmp_path / "ray-9" / "token").write_text("secret")

    with (
        pytest.raises(NoWorkerError, match=r"no Ray of this node on 127\.0\.0\.1:9 "),
        connected(9),
    ):
        pass
