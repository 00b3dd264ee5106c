"""Figures beyond those that every run draws.

    python scripts/plots.py rank-collapse                 energy above the smallest rank, by round
    python scripts/plots.py rank-collapse seeds=0,1 federation.num_rounds=20
    python scripts/plots.py curves RUN RUN ...            test accuracy of finished runs

`rank-collapse` runs the methods of experiment=rank_collapse, or of another experiment; its
arguments are those of scripts/compare.py.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_script  # noqa: E402


def main() -> int:
    """Draw what the subcommand asks for."""
    return run_script(_draw)


def _draw() -> int:
    arguments = _parser().parse_args()
    if arguments.figure == "rank-collapse":
        _rank_collapse(arguments.setting)
    else:
        _curves(arguments.run, arguments.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    collapse = figures.add_parser("rank-collapse", help="run the methods and draw their energies")
    collapse.add_argument("setting", nargs="*", help="key=value, as for scripts/compare.py")
    curves = figures.add_parser("curves", help="test accuracy by round and by MB, of run folders")
    curves.add_argument("run", nargs="+", type=Path, help="folder with a metrics.jsonl")
    curves.add_argument("--output", type=Path, default=Path("curves.png"), help="the PNG to write")
    return parser


def _rank_collapse(settings: list[str]) -> None:
    from hafl_app.experiments.command import parse_command
    from hafl_app.experiments.comparison import check_first

    command = parse_command(settings, experiment="rank_collapse")
    check_first(command)
    from hafl_app.experiments.collapse import rank_collapse  # takes seconds: not before a typo

    rank_collapse(command, lambda text: print(text, flush=True))


def _curves(folders: list[Path], output: Path) -> None:
    from hafl_app.experiments.results import read_curve

    runs = {str(folder): [read_curve(folder)] for folder in folders}
    from hafl_app.experiments.figures import draw_comparison

    draw_comparison({"": runs}, output, "Test scores")
    print(f"Written: {output}")


if __name__ == "__main__":
    sys.exit(main())
