"""A trainer of a simulation on Ray: its replies are those of one at a time. Ray is not needed."""

import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest
from flwr.app import Context
from node_factories import context, request
from running import run_tiny
from test_cohort_replies import SGD, assert_same_run

from hafl_app.client import ray_trainers, routing
from hafl_app.client.ray_trainers import TRAINERS, Trainer, ask_trainer, number_of_trainers
from hafl_app.engines.in_process import InProcessGrid
from hafl_app.wire.faults import Fault, fault_of


class TrainerGrid(InProcessGrid):
    """Four messages at once, each in a thread, as Flower's actors pass them to a trainer."""

    def __init__(self, app, num_nodes, run_config):
        super().__init__(app, num_nodes, run_config)
        together = shlex.join([*shlex.split(run_config["overrides"]), "federation.cohort=3"])
        self.trainer = Trainer({"overrides": together}, pause_s=0.1)

    def push_messages(self, messages):
        messages = list(messages)
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{id(self)}-{id(messages)}-{number}"
        with ThreadPoolExecutor(4) as threads:
            replies = threads.map(self._ask, messages)
            for message, reply in zip(messages, replies, strict=True):
                self._replies[message.metadata.message_id] = self._sent(reply)
        return [message.metadata.message_id for message in messages]

    def cohort_choice(self):
        return self.trainer.choice()

    def _ask(self, message):
        context = self._contexts[message.metadata.dst_node_id]
        copied = Context(
            context.run_id, context.node_id, context.node_config, context.state, context.run_config
        )
        reply, state = self.trainer.answer(message, copied)
        context.state = state
        return reply


@pytest.mark.parametrize("overrides", [(), ("model.head=local",)], ids=["averaged", "local heads"])
def test_the_run_is_that_of_one_at_a_time(tmp_path, overrides):
    run_tiny(tmp_path / "alone", *SGD, *overrides)
    summary = run_tiny(tmp_path / "joint", *SGD, *overrides, grid_type=TrainerGrid)
    assert summary["cohort"] == {
        "clients": 3,
        "reason": "as the setting says; 3 at once at most",
        "speedup": None,
    }
    assert_same_run(tmp_path / "alone", tmp_path / "joint")


def test_the_variable_of_the_environment_says_how_many_there_are():
    assert number_of_trainers({}) == 0
    assert number_of_trainers({TRAINERS: "0"}) == 0
    assert number_of_trainers({TRAINERS: "8"}) == 8


class FakeRay:
    """A Ray whose trainers die or raise over the messages that `outcomes` says."""

    class exceptions:  # noqa: N801  Ray's name
        class RayActorError(Exception):
            pass

        class RayTaskError(Exception):
            cause = ValueError("no such row")

    def __init__(self, *outcomes):
        self.outcomes, self.started, self.killed = list(outcomes), [], []
        self.answer = self.choice = self

    def remote(self, *arguments):
        return self if arguments else None

    def options(self, **options):
        self.started.append(options["name"])
        return self

    def cluster_resources(self):
        return {}

    def get(self, _reference):
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def kill(self, actor):
        self.killed.append(actor)


@pytest.fixture
def fake(monkeypatch):
    def use(*outcomes):
        ray = FakeRay(*outcomes)
        monkeypatch.setattr(ray_trainers, "_ray", lambda: ray)
        monkeypatch.setattr(ray_trainers, "_started", {})
        return ray

    return use


DIED = FakeRay.exceptions.RayActorError("the actor died")


class TestAsking:
    def test_nodes_are_shared_among_the_trainers_and_keep_their_state(self, fake):
        ray = fake(("first", "its state"), ("second", "another"))
        one, other = (context({"partition-id": number, "num-partitions": 5}) for number in (1, 2))
        assert ask_trainer(2, request("train"), one) == "first"
        assert ask_trainer(2, request("train"), other) == "second"
        assert (one.state, other.state) == ("its state", "another")
        assert ray.started == ["hafl-trainer-1", "hafl-trainer-0"]

    def test_a_trainer_that_dies_is_started_again_once(self, fake):
        ray = fake(DIED, ("reply", "state"))
        assert ask_trainer(1, request("train"), context()) == "reply"
        assert len(ray.started) == 2
        assert len(ray.killed) == 1

    def test_one_that_dies_again_is_an_error_reply(self, fake, monkeypatch):
        monkeypatch.setenv(TRAINERS, "1")
        fake(DIED, DIED)
        reply = routing.answer(request("train"), context())
        assert fault_of(reply) is Fault.WORKER_FAILED
        assert "died twice" in reply.error.reason

    def test_what_a_trainer_raises_is_raised_here(self, fake):
        fake(FakeRay.exceptions.RayTaskError())
        with pytest.raises(ValueError, match="no such row"):
            ask_trainer(1, request("train"), context())
