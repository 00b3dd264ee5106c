"""The task on Flower's Ray engine: as FlowerTune does it, and as this project does."""

import os
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.simulation_ours import client_app, serve
from benchmarks.simulation_task import SimulationTask, State, to_state
from hafl_app.engines.ray_cluster import NICENESS

OnRound = Callable[[], None]
Serve = Callable[[Grid, SimulationTask, OnRound], State]


def run_flower_rebuilt(task: SimulationTask, on_round: OnRound) -> State:
    """Run the task with Flower's FedAvg and clients that build their model for every message."""
    return _simulate(task, on_round, _serve_fedavg, _rebuilding_app(task))


def run_ours_on_ray(task: SimulationTask, on_round: OnRound) -> State:
    """Run the task with this project's strategy, ClientApp and priority of Ray's workers."""
    os.environ.setdefault(NICENESS, "0")
    return _simulate(task, on_round, serve, client_app(task))


def _simulate(task: SimulationTask, on_round: OnRound, serve: Serve, app: ClientApp) -> State:
    """Simulate with one actor: the clients come one after another, as in the loop."""
    server, results = ServerApp(), []

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        results.append(serve(grid, task, on_round))

    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
    backend: Any = {"init_args": {"num_cpus": 1}, "client_resources": resources}
    run_simulation(server, app, task.num_clients, backend_config=backend)
    state: State = results[0]
    return state


class _WatchedFedAvg(FedAvg):
    def __init__(self, on_round: OnRound) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0)
        self._on_round = on_round

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        result = super().aggregate_train(server_round, replies)
        self._on_round()
        return result


def _serve_fedavg(grid: Grid, task: SimulationTask, on_round: OnRound) -> State:
    initial = ArrayRecord(to_state(task.build().initial))
    strategy = _WatchedFedAvg(on_round)
    strategy.min_available_nodes = strategy.min_train_nodes = task.num_clients
    result = strategy.start(grid, initial, num_rounds=task.num_rounds)
    return dict(result.arrays.to_torch_state_dict())


def _rebuilding_app(task: SimulationTask) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        workload = task.build()
        state: State = dict(message.content.array_records["arrays"].to_torch_state_dict())
        server_round = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        trained = workload.train(state, server_round, client)
        metrics = MetricRecord({"num-examples": workload.num_examples(client)})
        content = RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics})
        return Message(content, reply_to=message)

    return app
