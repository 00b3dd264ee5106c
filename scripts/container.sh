#!/usr/bin/env bash
# Entry point of the image: a program of the list with its arguments, or else overrides (or none)
# for a simulation: docker run IMAGE flower-supernode --help; docker run IMAGE experiment=demo
set -euo pipefail
export FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1-}" in
    flower-superlink | flower-supernode | flwr | ray | python | bash) exec "$@" ;;
    *) exec python scripts/simulate.py "$@" ;;
esac
