"""A grid of nodes that only answer queries: at once, late, or never."""

from flwr.app import Error, Message, RecordDict

from hafl_app.wire.node_profile import PROFILE, NodeProfile

SILENT = object()


class FakeGrid:
    """Nodes by id; what they answer is a profile, a record, the reason of an error, or nothing.

    A silent node answers what it was asked before as soon as its answer is set.
    """

    def __init__(self, **nodes):
        self.nodes = {}
        self.queries = []
        self.join(**nodes)

    def join(self, **nodes):
        self.nodes |= {int(name[1:]): answer for name, answer in nodes.items()}

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"query {len(self.queries)}"
            self.queries.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        asked = [m for m in self.queries if m.metadata.message_id in set(message_ids)]
        return [self._answer(m) for m in asked[::-1] if self._node(m) is not SILENT]

    def asked(self):
        return [message.metadata.dst_node_id for message in self.queries]

    def _node(self, message):
        return self.nodes.get(message.metadata.dst_node_id, SILENT)

    def _answer(self, message):
        answer = self._node(message)
        if isinstance(answer, str):
            return Message(Error(1000, answer), reply_to=message)
        record = answer.to_record() if isinstance(answer, NodeProfile) else answer
        return Message(RecordDict({PROFILE: record}), reply_to=message)
