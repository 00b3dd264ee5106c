import shlex

import pytest
from node_factories import context, request
from running import TINY

from hafl_app.client.bandwidth import bandwidth_kbps
from hafl_app.client.handlers import query
from hafl_app.client.node_config import NodeConfigError
from hafl_app.wire.node_profile import NodeProfile


def test_comes_as_a_number_or_as_text():
    assert bandwidth_kbps({"bandwidth-kbps": 250}) == 250
    assert bandwidth_kbps({"bandwidth-kbps": "4000"}) == 4000


def test_is_unknown_if_it_is_not_stated():
    assert bandwidth_kbps({"rank": 4}) == 0


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "", "fast", "1e3", 10**9 + 1, "9" * 5000])
def test_anything_else_is_refused_in_one_line(value):
    with pytest.raises(NodeConfigError, match=r"^bandwidth-kbps in.*: expected a whole number") as (
        caught
    ):
        bandwidth_kbps({"bandwidth-kbps": value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) + len(caught.value.details) < 250


@pytest.mark.parametrize(
    ("node_config", "devices", "expected"),
    [
        ({}, "mixed", 45_740),  # partition 1 of 3 has rank 4, a Jetson
        ({"bandwidth-kbps": 300}, "mixed", 300),
        ({}, "none", 0),
    ],
)
def test_without_one_it_is_that_of_the_simulated_device(node_config, devices, expected):
    run_config = {"overrides": shlex.join([*TINY, f"devices={devices}"])}

    reply = query(request(), context(node_config, run_config=run_config))

    assert NodeProfile.from_reply(reply).bandwidth_kbps == expected
