#!/usr/bin/env bash
# The main job on an embedded default: federated HAFL fine-tuning of MiniLM (2 layers) by 8 clients
# of ranks 2, 4 and 8, over 5 rounds of generated text. Nothing is downloaded beyond the set-up.
# Further overrides are passed on: bash scripts/demo.sh seed=1
set -euo pipefail
export FLWR_TELEMETRY_ENABLED=0
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec "${HAFL_VENV:-.venv}/bin/python" scripts/simulate.py experiment=demo "$@"
