"""Export a run's adapter for others to use, with a model card.

    python scripts/export.py RUN --output DIR --rank 4 8     an adapter for each rank
    python scripts/export.py RUN --output DIR --merge        base model and adapter in one
    python scripts/export.py RUN --output DIR --push ME/NAME the adapter as it is, on the hub

RUN is a run's folder (its last round), or an adapter's, such as RUN/adapter-best.
See docs/exporting.md.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402

if TYPE_CHECKING:
    from hafl_app.publishing.export import Written


def main() -> int:
    """Export what the command line asks for."""
    arguments = _parser().parse_args()
    return run_script(lambda: _export(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run or an adapter")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--merge", action="store_true", help="write a whole model")
    what.add_argument("--rank", type=int, nargs="+", default=[], help="cut to these ranks")
    parser.add_argument("--dtype", help="of merged weights (float32)")
    parser.add_argument("--base", metavar="NAME", help="the base model's name on the hub")
    parser.add_argument("--push", metavar="USER/NAME", help="upload with your own token")
    parser.add_argument("--public", action="store_true", help="for all to see (default: private)")
    parser.add_argument("--force", action="store_true", help="replace what is in DIR")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the base model's own Python code"
    )
    return parser


def _export(arguments: argparse.Namespace) -> int:
    from hafl_app.training.adapter_card import adapter_folder, read_card

    if arguments.public and not arguments.push:
        raise ValueError("--public: nothing is uploaded without --push USER/NAME")
    read_card(adapter_folder(arguments.source))
    # They take seconds: not before a typo.
    from hafl_app.publishing.export import ExportRequest, export_adapter
    from hafl_app.publishing.push import check_push, push_folder

    repos = {rank: f"{arguments.push}-rank-{rank}" for rank in arguments.rank} or {
        None: arguments.push
    }
    if arguments.push:
        for repo in repos.values():
            check_push(repo)
    request = ExportRequest(
        arguments.source,
        arguments.output,
        merge=arguments.merge,
        ranks=arguments.rank,
        dtype=arguments.dtype,
        base=arguments.base,
        force=arguments.force,
        trust_remote_code=arguments.trust_remote_code,
    )
    for written in export_adapter(request):
        print(_report(written))
        if arguments.push:
            cut = written.export.truncation
            repo = repos[cut.rank if cut else None]
            print(f"Pushed:  {push_folder(written.folder, repo, public=arguments.public)}")
    return 0


def _report(written: "Written") -> str:
    """Describe a written folder, and the loss of a cut."""
    from hafl_app.printable import printable

    export = written.export
    size = sum(file.stat().st_size for file in written.folder.iterdir()) / 1e6
    modules = len(export.stored.adapter.modules)
    lines = [f"Written: {written.folder} ({size:.3g} MB): rank {export.rank}, {modules} modules"]
    if cut := export.truncation:
        lines.append(f"         lost {cut.lost:.2%} of the squared norm; by module:")
        lines += [
            f"         {share:7.2%}  {printable(n)}"
            for n, share in sorted(cut.lost_by_module.items())
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
