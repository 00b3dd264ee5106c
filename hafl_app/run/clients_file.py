"""``clients.json`` of a run: who takes part and who is left out, written while it goes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hafl_app.server.node_directory import NodeDirectory
from hafl_app.tracking.jsonl import CLIENTS_FILE, replace_file
from hafl_app.wire.node_profile import NodeProfile


class ClientsFile:
    """Writes the clients into a run's folder whenever they have changed.

    Parameters
    ----------
    folder
        Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / CLIENTS_FILE
        self._written: tuple[list[NodeProfile], Mapping[int, str]] | None = None

    def update(self, directory: NodeDirectory) -> None:
        """Write the nodes that take part, and those that are left out with the reason.

        Raises
        ------
        OSError
            When the disk does not take it.
        """
        current = directory.in_order(), dict(directory.refusals)
        if current == self._written:
            return
        profiles, refusals = current
        content = {
            "clients": [_client(profile) for profile in profiles],
            "left_out": {str(node_id): reason for node_id, reason in refusals.items()},
        }
        replace_file(self._file, json.dumps(content, indent=1) + "\n")
        self._written = current


def _client(profile: NodeProfile) -> dict[str, Any]:
    return {
        "node_id": profile.node_id,
        "partition_id": profile.partition_id,
        "rank": profile.rank,
        "examples": profile.num_examples,
        "device": profile.device_line,
    }
