"""The task as this project simulates it: its strategy, messages and engines."""

import functools
from collections.abc import Callable

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from benchmarks.simulation_task import (
    SimulationTask,
    State,
    Workload,
    to_adapter,
    to_state,
)
from hafl_app.client_app import app as real_app
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.lowrank.factors import initial_adapter
from hafl_app.run import build
from hafl_app.server.rounds import run_rounds
from hafl_app.training.adapter_arrays import from_arrays, to_arrays
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.wire.node_profile import PROFILE, NodeProfile
from hafl_app.wire.records import (
    METRICS,
    NUM_EXAMPLES,
    AdapterArrays,
    adapter_content,
    read_adapter,
)

OnRound = Callable[[], None]


def run_inprocess(task: SimulationTask, on_round: OnRound) -> State:
    """Run the task in the in-process engine."""
    with server_identity():
        return serve(InProcessGrid(client_app(task), task.num_clients), task, on_round)


def serve(
    grid: Grid, task: SimulationTask, on_round: OnRound, on_start: OnRound = lambda: None
) -> State:
    """Run the task's rounds over a grid, with everything a run has but scores and files.

    Parameters
    ----------
    on_start
        Called when all nodes have said what they are, before the first round.
    """
    settings = task.settings
    strategy = build.strategy(settings)
    directory = build.node_directory(settings, None)
    strategy.coordinator.participation.wait_for_nodes(grid, directory)
    if task.payload_bytes:
        initial = task.build().initial
    else:
        text = build.federated_text(settings, task.num_clients)
        spec = build.model_spec(settings, len(text.label_names))
        initial = initial_adapter(adapter_shapes(spec), settings.lora.max_rank, settings.seed)
    strategy.coordinator.prepare(initial, lambda _: None)

    def after_round(_: int) -> bool:
        on_round()
        return False

    on_start()
    run_rounds(strategy, grid, 1, after_round)
    return to_state(strategy.global_adapter)


def client_app(task: SimulationTask) -> ClientApp:
    """Return the project's own ClientApp for the task, or one that does nothing as fast."""
    app = ClientApp()

    def train(message: Message, context: Context) -> Message:
        if task.payload_bytes:
            return _echo(task, message, int(context.node_config["partition-id"]))
        return _handle(task, message, context)

    def query(message: Message, context: Context) -> Message:
        if not task.payload_bytes:
            return _handle(task, message, context)
        client = int(context.node_config["partition-id"])
        examples = _workload(task).num_examples(client)
        rank = task.settings.lora.max_rank
        profile = NodeProfile(client, task.num_clients, rank, examples, "cpu")
        return Message(RecordDict({PROFILE: profile.to_record()}), reply_to=message)

    app.train()(train)
    app.query()(query)
    return app


def _handle(task: SimulationTask, message: Message, context: Context) -> Message:
    # Flower's simulation from Python gives the clients no run config, and allows no change of it.
    run_config = UserConfig({"overrides": " ".join(task.all_overrides)})
    return real_app(
        message,
        Context(context.run_id, context.node_id, context.node_config, context.state, run_config),
    )


def _echo(task: SimulationTask, message: Message, client: int) -> Message:
    """Decode what came, let the client do its nothing, and encode it: as the real handler does."""
    received = read_adapter(message.content)
    state = to_state(from_arrays(received.modules, received.head))
    trained = to_adapter(_workload(task).train(state, 0, client))
    arrays = AdapterArrays(*to_arrays(trained))
    metrics = MetricRecord({NUM_EXAMPLES: _workload(task).num_examples(client), "loss": 0.0})
    content = adapter_content(arrays, **{METRICS: metrics})
    return Message(content, reply_to=message)


@functools.lru_cache(maxsize=1)
def _workload(task: SimulationTask) -> Workload:
    return task.build()
