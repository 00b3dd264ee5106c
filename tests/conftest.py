"""Settings that every test needs before torch and the package are imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Named axes in signatures are checked at run time, in the tests only.
install_import_hook("hafl_app.lowrank", "beartype.beartype")

torch.set_num_threads(1)
settings.register_profile("hafl", deadline=None)
settings.load_profile("hafl")
