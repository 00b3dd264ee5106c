"""Settings of a tiny run, and the line that refuses them."""

import pytest
from running import TINY

from hafl_app.config.compose import SettingsError, compose
from hafl_app.config.schema import Settings
from hafl_app.run.checks import check_settings

CAUSAL = ("model=tiny_random_causal", "dataset=dolly", "dataset.path=folder")
IMAGES = "experiment=digits"
LOCAL_DP = (
    *("privacy=local_dp", "federation.fraction_evaluate=0", "federation.max_retries=0"),
    "federation.alone_clients_per_rank=0",
)
LONE_OFF = ("federation.alone_clients_per_rank=0", "federation.max_retries=0")
CLOSED = "model.head=closed_form"
SECURE = ("privacy=secure_aggregation", "strategy=zero_padding")
SCAFFOLD = ("client=sgd", "client.max_grad_norm=0", "federation.scaffold=true")


def tiny_settings(*overrides: str) -> Settings:
    """Return the settings of a tiny run with these."""
    tiny = [o for o in TINY if not o.startswith(("model=", "dataset"))]
    own = {o.partition("=")[0] for o in overrides} | {"experiment"}
    base = [] if IMAGES in overrides else ["model=tiny_random", "dataset=synthetic"]
    return compose([*(o for o in base if o.partition("=")[0] not in own), *tiny, *overrides])


def refusal(*overrides: str) -> str:
    """Return the line that refuses these."""
    with pytest.raises(SettingsError) as caught:
        check_settings(tiny_settings(*overrides))
    return str(caught.value)
