"""The limit of a simulation: a bare loop over the clients, and pfl's simulator beside it."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.simulation_task import NoOp, SimulationTask, State, Training, to_state

OnRound = Callable[[], None]


def run_loop(task: SimulationTask, on_round: OnRound) -> State:
    """Run the task as a bare loop; return the global state after the last round."""
    workload = task.build()
    state = to_state(workload.initial)
    clients = range(task.num_clients)
    total = sum(workload.num_examples(client) for client in clients)
    for server_round in range(1, task.num_rounds + 1):
        mean = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for client in clients:
            weight = workload.num_examples(client) / total
            for name, tensor in workload.train(state, server_round, client).items():
                mean[name].add_(tensor, alpha=weight)
        state = mean
        on_round()
    return state


def has_pfl() -> bool:
    """Whether pfl is installed."""
    return importlib.util.find_spec("pfl") is not None


def run_pfl(task: SimulationTask, on_round: OnRound) -> State:
    """Run the task with pfl's `SimulatedBackend` and its own loop of local SGD."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics

    class Watch(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
            on_round()
            return False, Metrics()

    workload = task.build()
    model = _pfl_model(workload)
    users = _pfl_users(workload)
    backend = SimulatedBackend(users, users, postprocessors=[WeightByDatapoints()])
    # The learning rate of the round's settings; one pass over the client's batches.
    rate = task.settings.client.learning_rate
    training = NNTrainHyperParams(local_batch_size=1, local_num_epochs=1, local_learning_rate=rate)
    rounds = NNAlgorithmParams(
        central_num_iterations=task.num_rounds,
        evaluation_frequency=task.num_rounds + 1,
        train_cohort_size=task.num_clients,
        val_cohort_size=0,
    )
    FederatedAveraging().run(
        rounds, backend, model, training, None, [Watch()], send_metrics_to_platform=False
    )
    return {
        name.replace("|", "."): tensor.detach().clone()
        for name, tensor in model.variable_map.items()
    }


def _pfl_model(workload: Any) -> Any:
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Module(torch.nn.Module):
        """The trainable tensors by name, with what pfl asks of a model."""

        def __init__(self) -> None:
            super().__init__()
            trainable = getattr(workload, "parameters", None) or {
                name: torch.nn.Parameter(tensor.clone())
                for name, tensor in to_state(workload.initial).items()
            }
            for name, parameter in trainable.items():
                self.register_parameter(name.replace(".", "|"), parameter)

        def loss(self, *batch: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = workload.loss(*batch)
            return result

        def metrics(self, *_: torch.Tensor) -> dict[str, Any]:
            return {}

    class Model(PyTorchModel):  # type: ignore[misc]
        def do_multiple_epochs_of(self, user_dataset: Any, *arguments: Any, **named: Any) -> Any:
            if not isinstance(workload, NoOp):
                workload.model.train()
                return super().do_multiple_epochs_of(user_dataset, *arguments, **named)
            with torch.no_grad():
                for name, new in workload.train(
                    self.variable_map, 0, int(user_dataset.user_id)
                ).items():
                    self.variable_map[name].copy_(new)
            return None

        def evaluate(self, *_: Any, **__: Any) -> Any:
            return Metrics()  # pfl scores the clients in the first round, the others do not

    module = Module()
    # A central step of 1 adds the mean change as it is.
    return Model(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), 1.0))


def _pfl_users(workload: Any) -> Any:
    """Return a data set whose cohorts are all clients in turn, round after round."""
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDatasetBase

    class User(Dataset):  # type: ignore[misc]
        def __init__(self, server_round: int, client: int) -> None:
            super().__init__((), user_id=str(client))
            self._key = server_round, client

        def __len__(self) -> int:
            return int(workload.num_examples(self._key[1]))

        def iter(self, _: int | None) -> Any:
            batches = workload.batches(*self._key) if isinstance(workload, Training) else ()
            return ((b.input_ids, b.attention_mask, b.labels) for b in batches)

    class Users(FederatedDatasetBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._round = 0

        def __next__(self) -> Any:
            raise NotImplementedError

        def get_cohort(self, cohort_size: int) -> Any:
            self._round += 1
            return ((User(self._round, client), client) for client in range(cohort_size))

    return Users()
