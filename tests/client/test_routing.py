"""Where a message is answered."""

import logging
from contextlib import contextmanager

import pytest
from flwr.app import Message, RecordDict
from node_factories import context, request

from hafl_app.client import routing as dispatch
from hafl_app.client.handlers import HANDLERS
from hafl_app.client.warm_worker.ask import NoWorkerError, WorkerFailedError
from hafl_app.wire.faults import Fault, fault_of

WORKER = {"worker": "127.0.0.1:6390"}


@pytest.fixture
def here(monkeypatch):
    """Return the kinds of messages that were answered in this process."""
    answered = []

    def handler(message, context):
        answered.append(message.metadata.message_type)
        return Message(RecordDict(), reply_to=message)

    for kind in ("query", "train", "evaluate"):
        monkeypatch.setitem(HANDLERS, kind, handler)
    return answered


@pytest.fixture
def ray(monkeypatch):
    """Return the ports connected to; what happens then is set with `fails`."""

    class Ray:
        def __init__(self):
            self.ports, self.fails = [], None

    found = Ray()

    @contextmanager
    def connected(port):
        found.ports.append(port)
        if isinstance(found.fails, NoWorkerError):
            raise found.fails
        yield None

    def ask(workers, options, message, context):
        if found.fails:
            raise found.fails
        return Message(RecordDict(), reply_to=message)

    monkeypatch.setattr(dispatch, "connected", connected)
    monkeypatch.setattr(dispatch, "ask_worker", ask)
    return found


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_node_without_a_worker_answers_here(kind, here, ray):
    assert dispatch.answer(request(kind), context()).has_content()
    assert (here, ray.ports) == ([kind], [])


def test_a_node_with_a_worker_answers_there(here, ray):
    assert dispatch.answer(request(), context(WORKER)).has_content()
    assert (here, ray.ports) == ([], [6390])


def test_without_ray_it_answers_here_and_says_so_once(here, ray, caplog):
    ray.fails = NoWorkerError("no Ray of this node on 127.0.0.1:6390")

    with caplog.at_level(logging.INFO):
        reply = dispatch.answer(request("train"), context(WORKER))

    assert reply.has_content()
    assert here == ["train"]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "127.0.0.1:6390" in told[0]


def test_a_worker_that_fails_is_an_error_reply_with_its_reason(here, ray):
    ray.fails = WorkerFailedError("this node's worker died twice")

    reply = dispatch.answer(request("train"), context(WORKER))

    assert fault_of(reply) is Fault.WORKER_FAILED
    assert reply.error.reason == "this node's worker died twice"
    assert here == []


def test_a_node_config_that_means_nothing_is_an_error_reply(here, ray, caplog):
    reply = dispatch.answer(request(), context({"worker": "10.0.0.5:6390"}))

    assert fault_of(reply) is Fault.WORKER_FAILED
    assert "worker in this node's --node-config" in reply.error.reason
    assert "10.0.0.5" not in reply.error.reason  # the operator's log has it
    assert "10.0.0.5:6390" in caplog.text
    assert (here, ray.ports) == ([], [])


def test_no_exceptions_text_is_left_to_flower(here, ray, caplog):
    ray.fails = RuntimeError("row 3: a private note in /home/ada/diary.csv")

    reply = dispatch.answer(request("train"), context(WORKER))

    assert fault_of(reply) is Fault.UNEXPECTED
    assert reply.error.reason == (
        "unexpected RuntimeError on this node; its own log has the traceback"
    )
    assert "a private note" in caplog.text
