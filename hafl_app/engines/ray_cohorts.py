"""A simulation on Ray whose clients train together: its processes, and what it cannot do."""

import os
from collections.abc import Mapping

from hafl_app.client.ray_trainers import TRAINERS
from hafl_app.config.overrides import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.engines.flower_run import SimulationResources

_FLOWER_THREADS = 32  # Python's own limit for a pool of threads, which is Flower's


def trains_together(settings: Settings) -> bool:
    """Whether a number of clients is given that are to train together."""
    return (settings.federation.cohort_clients or 1) > 1


def trainers_for(settings: Settings, num_gpus: int, ray_address: str | None) -> int:
    """Return how many trainers a simulation has: one for each GPU, or one on the CPU.

    Parameters
    ----------
    settings
        With clients that train together.
    num_gpus
        CUDA devices that clients may use; 0 without, or if they train on the CPU.
    ray_address
        Of a Ray cluster that is to be used; None for a Ray of the run's own.

    Raises
    ------
    SettingsError
        If so many clients cannot come at once, or on a cluster.
    """
    federation, trainers = settings.federation, max(1, num_gpus)
    given = f"federation.cohort={federation.cohort}"
    if ray_address:
        raise SettingsError(f"{given}: on a Ray of the run's own alone, not on {ray_address}")
    most = flower_messages_at_once() // trainers
    if min(federation.cohort_clients or 1, federation.num_clients) > most:
        where = f" for each of {trainers} GPUs" if trainers > 1 else ""
        raise SettingsError(
            f"{given}: on this machine Flower's simulation has {most} messages at once{where}; "
            f"expected at most {most}, or engine=inprocess"
        )
    return trainers


def flower_messages_at_once() -> int:
    """Return how many messages Flower's simulation has under way at most on this machine.

    It waits for its actors in the threads of a `ThreadPoolExecutor` with Python's default size.
    """
    return min(_FLOWER_THREADS, (os.cpu_count() or 1) + 4)


def resources_of_cohorts(settings: Settings, trainers: int) -> SimulationResources:
    """Return the resources with which the clients of a cohort for each trainer come at once.

    Their processes wait most of the time, so Ray counts on as many CPUs as there are of them.
    """
    federation = settings.federation
    at_once = min((federation.cohort_clients or 1) * trainers, federation.num_clients)
    return SimulationResources(federation.num_clients, 1, 0.0, cluster_cpus=at_once)


def trainer_environment(trainers: int) -> Mapping[str, str]:
    """Return what tells the processes of a simulation that it has trainers."""
    return {TRAINERS: str(trainers)}
