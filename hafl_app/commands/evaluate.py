"""`hafl evaluate`: a saved adapter, or a base model alone, scored by itself."""

from collections.abc import Sequence

from hafl_app.cli import run_script


def main(arguments: Sequence[str]) -> int:
    """Score what the command line names, and print it; return the exit code."""
    return run_script(lambda: _evaluate(arguments))


def _evaluate(arguments: Sequence[str]) -> int:
    from hafl_app.experiments.evaluation_request import (  # noqa: PLC0415
        read_request,
        require_adapter,
    )

    request = read_request(arguments)
    require_adapter(request)
    from hafl_app.experiments.evaluation import score, table  # noqa: PLC0415  takes seconds

    print(table(score(request)))
    return 0
