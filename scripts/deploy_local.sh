#!/usr/bin/env bash
# One run on a real SuperLink and SuperNodes on this machine, with TLS, keys and the fence:
# bash scripts/deploy_local.sh --nodes 3 -- federation.num_rounds=3
# Everything that it starts is stopped at the end, on Ctrl-C and on failure.
set -euo pipefail
export FLWR_TELEMETRY_ENABLED=0
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec "${HAFL_VENV:-.venv}/bin/python" -m hafl_app.deployment "$@"
