"""`python scripts/make_credentials.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hafl_app.cli import run_script
from hafl_app.deployment.credentials import MOST_DAYS, Credentials, make_credentials


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the credentials that the command line asks for; return the exit code."""
    options = _parser().parse_args(arguments)

    def job() -> int:
        made = make_credentials(options.folder, options.host, options.node, options.days)
        _tell(made, options.node)
        return 0

    return run_script(job)


def _tell(made: Credentials, nodes: Sequence[str]) -> None:
    lines = [
        f"on the server     {made.server_certificate.name}, {made.server_key.name}, {made.ca.name}",
        f"on every device   {made.ca.name} and its own key:",
        *(f"                  {made.node_key(name).relative_to(made.folder)}" for name in nodes),
        "kept elsewhere    ca.key: whoever has it can pretend to be the server",
    ]
    print(f"Credentials in {made.folder}", *lines, sep="\n")  # noqa: T201


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_credentials.py",
        description="Make a certificate authority, a server certificate and a key pair per node.",
    )
    parser.add_argument("folder", type=Path, help="new folder; an existing one is refused")
    parser.add_argument(
        *("--host", "-H"),
        action="append",
        default=[],
        metavar="NAME_OR_ADDRESS",
        help="where devices reach the server, e.g. fl.example.org; repeatable "
        "(localhost, 127.0.0.1 and ::1 are always in)",
    )
    parser.add_argument(
        *("--node", "-n"),
        action="append",
        default=[],
        required=True,
        metavar="NAME",
        help="a node to make a key pair for; repeatable",
    )
    parser.add_argument(
        "--days",
        type=int,
        default=365,
        help=f"validity of the certificates, 1 to {MOST_DAYS} (default: %(default)s)",
    )
    return parser
