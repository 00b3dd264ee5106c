"""Asks a node in a process of its own, as Flower does: `asking.py APP_FOLDER FILE`.

FILE holds a pickled list: either a request for the ClientApp, or the name of a worker to report on.
What came of it is written back.
"""

import contextlib
import pickle
import sys
from pathlib import Path
from typing import Any

APP_FOLDER, FILE = sys.argv[1], Path(sys.argv[2])
sys.path[:0] = [APP_FOLDER, str(Path(__file__).parent)]

from flwr.supercore.task_identity import TaskIdentity  # noqa: E402
from node_factories import context, request  # noqa: E402


def ask(kind: str, content: Any, node_config: Any, run_id: int, node_id: int) -> dict[str, Any]:
    """Let the ClientApp answer."""
    from hafl_app.client_app import app

    overrides = node_config.pop("overrides")
    node = context(node_config, run_id, run_config={"overrides": overrides})
    node.node_id = node_id
    reply = app(request(kind, content, run_id), node)
    return {
        "content": reply.content if reply.has_content() else None,
        "error": reply.error.reason if reply.has_error() else None,
        "state": node.state,
        "heavy": [name for name in ("torch", "hydra", "transformers") if name in sys.modules],
    }


def report(port: int) -> dict[str, Any]:
    """Return the report of every worker that does not end meanwhile."""
    from hafl_app.client.warm_worker.ray_workers import connected

    reports = {}
    with connected(port) as workers:
        import ray  # only now: it reads the token's place from the environment

        for name in workers.names():
            with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
                reports[name] = workers.report(name)
    return reports


if __name__ == "__main__":
    TaskIdentity.task_id = 1
    action, *arguments = pickle.loads(FILE.read_bytes())  # noqa: S301  written by the test
    FILE.write_bytes(pickle.dumps({"ask": ask, "report": report}[action](*arguments)))
