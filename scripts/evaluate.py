"""Score a saved adapter by itself: `python scripts/evaluate.py adapter=RUN/adapter dataset=gsm8k`.

adapter=FOLDER       of a run, such as RUN/adapter; none: the base model that model=... names, alone
metrics=loss         loss (with accuracy or perplexity), rouge-l, exact-match; several with commas
max_new_tokens=64    of a generated answer
max_examples=N       rows of the test set (all)
tasks=NAME,...       benchmarks of lm-eval, if it is installed, or YAML files of your own
output=FILE          the result as JSON

The rest are Hydra overrides as for scripts/simulate.py: the data set, client.device, and so on.
Rows are cut where the adapter's training cut them; dataset.max_length=N overrides it.
See docs/evaluating.md.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.cli import run_program  # noqa: E402


def main() -> int:
    """Score what the command line names, and print it."""
    return run_program(__doc__, _evaluate)


def _evaluate(arguments: list[str]) -> int:
    from hafl_app.experiments.evaluation_request import read_request, require_adapter

    request = read_request(arguments)
    require_adapter(request)
    from hafl_app.experiments.evaluation import score, table  # takes seconds: not before a typo

    print(table(score(request)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
