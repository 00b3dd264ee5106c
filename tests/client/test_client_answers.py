"""A node writes answers as far as the run asks and its operator allows, and sends their scores."""

import json
import shlex

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from running import TINY

from hafl_app import packages
from hafl_app.client import answers
from hafl_app.client.permissions import own_machine
from hafl_app.client_app import app
from hafl_app.config.compose import compose
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.lowrank.factors import initial_adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.training.adapter_arrays import to_arrays
from hafl_app.training.answers import GenerationScores
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.wire.faults import Fault, fault_of
from hafl_app.wire.message_types import EVALUATE_ANSWERS
from hafl_app.wire.records import CONFIG, METRICS, AdapterArrays, adapter_content, plan_record

ASKED = ("federation.generate_on_clients=3", "federation.generate_tokens=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "mine.jsonl"
    rows = [{"instruction": f"q{i}", "input": "", "output": f"secret{i}"} for i in range(80)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return ("model=tiny_random_causal", "dataset=instructions", f"dataset.path={file}")


def ask(*overrides: str, **node: object) -> Message:
    """Ask the first of five nodes for answers."""
    overrides = (*TINY, "strategy=zero_padding", "dataset.holdout_fraction=0.5", *overrides)
    adapter = initial_adapter(adapter_shapes(build.model_spec(compose(overrides), 0)), 2, seed=0)
    plan = TrainPlan({n: ModulePlan((0, 1), ()) for n in adapter.modules}, head="frozen")
    config = ConfigRecord({"server-round": 1})
    arrays = AdapterArrays(*to_arrays(adapter))
    content = adapter_content(arrays, **{CONFIG: config, "plan": plan_record(plan)})
    node = {"partition-id": 0, "num-partitions": 5, **node}
    with server_identity(), own_machine():
        grid = InProcessGrid(app, 1, {"overrides": shlex.join(overrides)}, [node])
        request = Message(RecordDict(dict(content)), 1, EVALUATE_ANSWERS)
        (reply,) = grid.send_and_receive([request])
    return reply


def test_scores_leave_the_node_and_no_text(data):
    reply = ask(*data, *ASKED)
    assert list(reply.content) == [METRICS]
    metrics = dict(reply.content[METRICS])
    assert set(metrics) == {"rouge-l", "exact-match", "num-examples", "left-out", "unanswered"}
    assert (metrics["num-examples"], metrics["unanswered"]) == (3, 0)
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_the_smaller_limit_of_run_and_node_holds(data, monkeypatch):
    given = []

    def score(model, base, prompts, references, options):
        given.append((options, prompts, references))
        return GenerationScores(0.5, 0.25, 1)

    monkeypatch.setattr(answers, "score_generation", score)
    ask(*data, *ASKED)
    tight = {"max-answers": 1, "max-answer-tokens": "1", "max-answer-seconds": 0.5}
    ask(*data, *ASKED, **tight)
    wide = {"max-answers": 99, "max-answer-tokens": 99, "max-answer-seconds": 9999}
    ask(*data, *ASKED, **wide)

    limits = [(o.max_examples, o.max_new_tokens, o.max_seconds) for o, _, _ in given]
    assert limits == [(3, 2, 120.0), (1, 1, 0.5), (3, 2, 120.0)]
    _, prompts, references = given[0]
    assert len(prompts) == len(references) == 6  # half of 65 rows, of five clients
    numbers = [reference.removeprefix("secret") for reference in references]
    assert all(f"q{n}\n" in prompt for n, prompt in zip(numbers, prompts, strict=True))


@pytest.mark.parametrize(
    ("overrides", "node", "reason"),
    [
        (ASKED, {"max-answers": 0}, "this node writes none, max-answers in its --node-config"),
        (ASKED, {"share": "losses,times"}, "federation.fraction_evaluate=1.0 needs the scores"),
        ((), {}, "generate_on_clients=0: the run's settings ask for no answers"),
        (("federation.generate_on_clients=3", "privacy=local_dp"), {}, "fraction_evaluate"),
    ],
)
def test_a_node_that_must_not_or_need_not_writes_none(data, overrides, node, reason, monkeypatch):
    monkeypatch.setattr(answers, "score_generation", lambda *_: pytest.fail("it has written"))
    reply = ask(*data, *overrides, **node)
    assert reply.has_error()
    assert reason in reply.error.reason


def test_a_malformed_limit_is_no_limit_to_answer_under(data):
    reply = ask(*data, *ASKED, **{"max-answers": "many"})
    assert fault_of(reply) == Fault.BAD_REQUEST
    assert "max-answers in this node's --node-config: expected a whole number" in reply.error.reason


def test_where_answers_cannot_be_scored_none_is_written(data, monkeypatch):
    monkeypatch.setattr(packages, "is_installed", lambda _: False)
    reply = ask(*data, *ASKED)
    assert "rouge-score is not installed on this node" in reply.error.reason
    assert "pip" not in reply.error.reason


def test_prompts_without_room_are_a_fault_of_the_data(data):
    reply = ask(*data, *ASKED, "dataset.max_length=4")
    assert fault_of(reply) == Fault.DATA_UNAVAILABLE
    assert "none of 6 prompts leaves room" in reply.error.reason
