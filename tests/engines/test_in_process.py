from importlib.metadata import version

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from hafl_app.engines.in_process import InProcessGrid, server_identity


def test_the_private_parts_are_those_of_this_version():
    # server_identity and InProcessGrid touch TaskIdentity._*, Message metadata's _message_id,
    # Run.create_empty and flwr.common.constant. Read them again before allowing another version.
    assert version("flwr") in {"1.41.0", "1.42.0"}


@pytest.fixture
def app():
    client_app = ClientApp()

    @client_app.query()
    def query(message, context):
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("no data")
        seen = int(context.state["count"]["n"]) if "count" in context.state else 0
        context.state["count"] = ConfigRecord({"n": seen + 1})
        content = RecordDict({"answer": ConfigRecord({"seen": seen, **context.run_config})})
        return Message(content, reply_to=message)

    return client_app


def ask(grid, *node_ids):
    return [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in node_ids]


class TestGrid:
    def test_every_node_answers_in_order_with_its_own_context(self, app):
        with server_identity():
            grid = InProcessGrid(app, 3, {"knob": "x"})
            first, third = grid.get_node_ids()[0], grid.get_node_ids()[2]
            replies = list(grid.send_and_receive(ask(grid, third, first)))
        assert [reply.metadata.src_node_id for reply in replies] == [third, first]
        assert replies[0].content["answer"] == ConfigRecord({"seen": 0, "knob": "x"})

    def test_state_survives_between_messages(self, app):
        with server_identity():
            grid = InProcessGrid(app, 1)
            seen = [next(iter(grid.send_and_receive(ask(grid, 1)))) for _ in range(3)]
        assert [reply.content["answer"]["seen"] for reply in seen] == [0, 1, 2]

    def test_a_node_that_raises_is_an_error_reply(self, app):
        with server_identity():
            grid = InProcessGrid(app, 2)
            good, bad = grid.send_and_receive(ask(grid, 1, 2))
        assert good.has_content()
        assert bad.has_error()
        assert bad.error.reason == "RuntimeError: no data"

    def test_a_reply_is_pulled_once(self, app):
        with server_identity():
            grid = InProcessGrid(app, 1)
            message_ids = list(grid.push_messages(ask(grid, 1)))
            assert len(list(grid.pull_messages(message_ids))) == 1
            assert list(grid.pull_messages(message_ids)) == []


def test_the_identity_is_given_back():
    before = TaskIdentity._run_id
    with pytest.raises(KeyError), server_identity(run_id=77):
        assert TaskIdentity.run_id == 77
        raise KeyError
    assert TaskIdentity._run_id == before
