"""Checks before anything starts: what can be known to fail is refused in one line."""

from hafl_app import assembly
from hafl_app.config.schema import Settings
from hafl_app.training.base import locate
from hafl_app.training.device import resolve_device


def check(settings: Settings) -> None:
    """Refuse settings that cannot work: base model, target modules, data, partitions, ranks.

    Raises
    ------
    ValueError
        In one line: the value, what was expected, and where.
    """
    resolve_device(settings.client.device)
    num_clients = settings.federation.num_clients
    assembly.strategy(settings).check(assembly.client_ranks(settings, num_clients))
    spec = assembly.base_spec(settings)
    if not (spec.random_weights and not spec.path):
        locate(spec)
    assembly.federated_text(settings, num_clients).sizes()
