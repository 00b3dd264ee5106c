"""ClientApp: pass each message to the node's handlers, which may live in another process.

A deployed SuperNode starts a process for every message, so this module imports neither torch nor
anything else that takes its time; `hafl_app.client.routing` does when the message is to be answered
right here.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hafl_app.client.routing import answer

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer with this node's profile."""
    return answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the plan's components on this node's data and upload them."""
    return answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score what the server sent on the share of data that this node kept aside."""
    return answer(message, context)
