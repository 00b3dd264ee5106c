"""ClientApp: pass each message to the node's handlers, which may live in another process.

A deployed SuperNode starts a process for every message, so this module imports neither torch nor
anything else that takes its time; `hafl_app.client.routing` does when the message is to be answered
right here.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hafl_app.client.routing import answer
from hafl_app.wire.message_types import ANSWERS, FEATURE_SUMS, TEMPERATURE_LOSSES

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer with this node's profile."""
    return answer(message, context)


@app.query(FEATURE_SUMS)
def feature_sums(message: Message, context: Context) -> Message:
    """Add up the features of this node's data, for a head in closed form."""
    return answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the plan's components on this node's data and upload them."""
    return answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score what the server sent on the share of data that this node kept aside."""
    return answer(message, context)


@app.evaluate(TEMPERATURE_LOSSES)
def temperature_losses(message: Message, context: Context) -> Message:
    """Score the head at several temperatures on this node's held-out data."""
    return answer(message, context)


@app.evaluate(ANSWERS)
def answers(message: Message, context: Context) -> Message:
    """Score what the model answers to this node's held-out prompts; the answers stay here."""
    return answer(message, context)
