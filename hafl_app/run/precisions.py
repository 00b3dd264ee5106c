"""The precision that server and nodes compute in: kept with a run, and the same when it resumes."""

from collections.abc import Iterable, Mapping
from typing import Final

from hafl_app.config.schema import Settings
from hafl_app.training.device import describe_device, resolve_device, resolve_precision
from hafl_app.wire.node_profile import NodeProfile

SETTING: Final = "client.precision"
_SERVER: Final = "server"


def server_precision(settings: Settings) -> str:
    """Return what this process computes in under these settings: ``fp32`` or ``bf16``."""
    return resolve_precision(settings.client.precision, resolve_device(settings.client.device))


def precisions(settings: Settings, profiles: Iterable[NodeProfile]) -> dict[str, str]:
    """Return the precision of the server and, by partition, of each node that states its own."""
    of_nodes = {str(p.partition_id): p.precision for p in profiles if p.precision}
    return {_SERVER: server_precision(settings), **of_nodes}


def changed_precision(
    then: Mapping[str, str], settings: Settings, profiles: Iterable[NodeProfile]
) -> str:
    """Return a line that names whose precision differs from that of the run to resume, else "".

    Only under ``client.precision=auto``, where every machine decides by itself.

    Parameters
    ----------
    then
        What `precisions` returned for the run to resume; empty if it is not known.
    """
    if settings.client.precision != "auto":
        return ""
    for who, now in precisions(settings, profiles).items():
        if (before := then.get(who, now)) != now:
            name = who if who == _SERVER else f"client {who}"
            device = describe_device(resolve_device(settings.client.device))
            where = f" on this machine ({device})" if who == _SERVER else ""
            return (
                f"{SETTING}=auto: {name} computed in {before} in the run to resume and would now "
                f"compute in {now}{where}; resume with {SETTING}={before}"
            )
    return ""
