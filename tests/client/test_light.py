"""The process that a deployed SuperNode starts for every message imports little."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "datasets", "hydra", "omegaconf", "pandas", "sklearn")


def imported_with(statements: str) -> list[str]:
    program = f"import sys\n{statements}\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.split()


def test_the_client_app_imports_no_model_and_no_settings():
    assert imported_with("import hafl_app.client_app") == []


def test_so_it_does_when_it_speaks_to_a_worker():
    assert (
        imported_with("import hafl_app.client_app, hafl_app.client.warm_worker.worker, ray") == []
    )


def test_what_is_heavy_is_noticed():
    assert imported_with("import hafl_app.client.permissions") == ["omegaconf"]
