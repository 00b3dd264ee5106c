#!/usr/bin/env bash
# Set everything up and check everything: style, types, layers, tests. Arguments go to pytest.
set -euo pipefail
export FLWR_TELEMETRY_ENABLED=0
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bin=${HAFL_VENV:-.venv}/bin
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 WANDB_MODE=offline
# Compiled once, not in each of the hundred processes that tests start.
unset PYTHONDONTWRITEBYTECODE
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
# Two processes of one thread each; the tests of a file stay together.
exec "$bin/pytest" -n 2 --dist loadfile --no-loadscope-reorder -m "not deploy and not soak and not gpu and not wheel and not browser and not site" "$@"
