"""Centralized LoRA, the upper reference: `python scripts/centralized.py experiment=hafl_banking77`.

Trains at lora.max_rank on all clients' training data in one place, with the settings of the
federation that the same arguments describe, and as many passes over the data. Arguments are Hydra
overrides as for scripts/simulate.py.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_program  # noqa: E402


def main() -> int:
    """Check the settings, train, and say where the results are."""
    return run_program(__doc__, _train)


def _train(arguments: list[str]) -> int:
    from hafl_app.config.compose import compose
    from hafl_app.run.checks import check_centralized
    from hafl_app.run.preflight import check
    from hafl_app.run.run_folder import absolute, check_new, default_folder

    settings = compose(arguments)
    check_centralized(settings)
    check(settings)
    given = absolute(settings.output_dir) if settings.output_dir else None
    if given is not None:
        check_new(given)
    folder = given or default_folder("centralized")
    from hafl_app.experiments.centralized import train_centralized  # takes seconds: after typos

    print(f"Output folder: {folder}", flush=True)
    summary = train_centralized(settings, folder, lambda text: print(text, flush=True))
    print(
        f"\nrank {summary['rank']}, {summary['num_examples']:,} examples, "
        f"{summary['passes']} passes, {summary['steps']:,} steps, {summary['seconds']:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
