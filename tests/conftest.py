"""Settings that every test needs before torch and the package are imported."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# Tokenized data of tests stays out of the user's cache.
if "HAFL_CACHE" not in os.environ:
    os.environ["HAFL_CACHE"] = tempfile.mkdtemp(prefix="hafl-cache-")
    atexit.register(shutil.rmtree, os.environ["HAFL_CACHE"], ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compute in float32 on every processor, in processes that they start as well, unless they ask
# for bf16: oneDNN's own setting, by which client.precision=auto goes.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")

import pytest
import torch
from absl.logging import PythonHandler
from hypothesis import settings
from jaxtyping import install_import_hook

# Named axes in signatures are checked at run time, in the tests only.
install_import_hook("hafl_app.lowrank", "beartype.beartype")

# Hydra sets up logging anew and closes all handlers; absl's would close pytest's own stream.
PythonHandler.close = lambda self: None

torch.set_num_threads(1)
settings.register_profile("hafl", deadline=None)
settings.load_profile("hafl")


# Those that take longest, longest first: two workers end together if the long files start first.
_LONGEST = (
    *("tests/test_end_to_end.py", "tests/run/test_resume.py", "tests/test_chaos.py"),
    *("tests/deployment/test_deploy_local.py", "tests/benchmarks/test_simulation.py"),
    *("tests/test_compare.py", "tests/training/test_step_memory.py", "tests/test_simulate.py"),
    *("tests/benchmarks/test_streaming_cost.py", "tests/server/test_rounds.py"),
    *("tests/test_vision_run.py", "tests/training/test_micro_batches.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, and let ``-m "not slow"`` leave out what has a command of its own."""
    places = {file: place for place, file in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
    for item in items:
        if any(map(item.get_closest_marker, ("deploy", "soak", "wheel", "browser", "site"))):
            item.add_marker(pytest.mark.slow)
