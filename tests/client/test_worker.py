"""The worker, called in this process."""

import logging
import os
import sys
import time
from threading import Event
from unittest import mock

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from node_factories import context, request

from hafl_app.client.handlers import HANDLERS
from hafl_app.client.permissions import OWN_MACHINE, Permissions, spelled_out
from hafl_app.client.warm_worker import ask as warm
from hafl_app.client.warm_worker.worker import Worker, clear_caches
from hafl_app.config import compose
from hafl_app.run import build


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """Let a worker change this process's environment, and undo it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def ended():
    return Event()


@pytest.fixture
def start(ended):
    def start(environment=None, idle_s=600.0, app_folder="/nowhere"):
        return Worker(app_folder, dict(os.environ) | (environment or {}), idle_s, ended.set)

    return start


@pytest.fixture
def handled(monkeypatch):
    """Return the contexts of the queries that were answered."""
    contexts = []

    def handler(message, context):
        contexts.append(context)
        logging.getLogger("hafl_app.anywhere").warning("round %d", len(contexts))
        context.state["kept"] = ConfigRecord({"answers": len(contexts)})
        return Message(RecordDict(), reply_to=message)

    monkeypatch.setitem(HANDLERS, "query", handler)
    return contexts


def test_the_answer_brings_the_reply_the_state_and_the_log(start, handled):
    answer = start().answer(request(), context(), {})

    assert answer.reply.has_content()
    assert answer.state["kept"]["answers"] == 1
    assert answer.log == ("WARNING hafl_app.anywhere: round 1",)


def test_each_message_is_answered_under_its_own_permissions(start, handled, tmp_path):
    worker, folder = start(), str(tmp_path)

    worker.answer(request(), context(), {"HAFL_ALLOWED_PATHS": folder})
    worker.answer(request(), context(), {})
    worker.answer(request(), context({"allowed-paths": folder}), {"HAFL_ALLOWED_PATHS": "*"})

    allowed = [Permissions.of(c.node_config, os.environ).paths for c in handled]
    assert allowed == [(folder,), (), (folder,)]  # and a node's config goes before


def test_permissions_spelled_out_are_those_of_config_and_environment():
    config = {"allowed-models": "org/a", "rank": 3}

    alone = Permissions.of(spelled_out(config, OWN_MACHINE), {})

    assert alone == Permissions.of(config, OWN_MACHINE)
    assert alone != Permissions.of(config, {})
    assert all(name.startswith(warm.PERMITTING) for name in OWN_MACHINE)


def test_a_worker_takes_the_environment_of_its_node_but_not_rays_part(start):
    os.environ.update({"RAY_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": "1", "HAFL_ALLOWED_PATHS": "*"})
    theirs = {"HF_HOME": "/theirs", "RAY_ADDRESS": "theirs", "CUDA_VISIBLE_DEVICES": "0,1"}

    Worker("/the/app", theirs, 600.0, lambda: None)

    ours = {"RAY_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": "1"}
    assert dict(os.environ) == {"HF_HOME": "/theirs"} | ours
    assert sys.path[0] == "/the/app"


def test_what_is_kept_is_kept_within_a_run(start, handled):
    settings = build.settings_of_run({"overrides": "dataset=synthetic"})
    worker = start()

    worker.answer(request(), context(run_id=1), {})
    data = build.federated_text(settings, 3)
    worker.answer(request(), context(run_id=1), {})
    assert build.federated_text(settings, 3) is data

    worker.answer(request(), context(run_id=2), {})
    assert build.federated_text(settings, 3) is not data


def test_what_one_run_composed_is_forgotten_too():
    build.settings_of_run({"overrides": "seed=3"})
    assert compose._compose.cache_info().currsize > 0

    clear_caches()

    assert compose._compose.cache_info().currsize == 0


class TestIdling:
    def test_ends_a_worker(self, start, ended):
        start(idle_s=0.2)

        assert ended.wait(5)

    def test_does_not_count_while_a_message_is_answered(self, start, ended, monkeypatch):
        def slow(message, context):
            time.sleep(0.5)
            return Message(RecordDict(), reply_to=message)

        monkeypatch.setitem(HANDLERS, "query", slow)
        worker = start(idle_s=0.3)

        worker.answer(request(), context(), {})

        assert not ended.is_set()
        assert ended.wait(5)


def test_an_older_worker_ends_when_it_is_told(start, ended):
    start().retire()

    assert ended.is_set()
