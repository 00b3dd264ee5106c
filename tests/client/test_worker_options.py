"""Options of the node's worker in the node config."""

import pytest

from hafl_app.client.warm_worker.options import WorkerOptions, WorkerOptionsError

ADDRESS = {"worker": "127.0.0.1:6390"}


@pytest.mark.parametrize("config", [{}, {"worker": ""}, {"partition-id": 3, "rank": 4}])
def test_a_node_that_asks_for_none_gets_none(config):
    assert WorkerOptions.of(config, 7) is None


def test_a_nodes_worker_is_its_own_unless_it_is_told_to_share():
    assert WorkerOptions.of(ADDRESS, 7).name != WorkerOptions.of(ADDRESS, 8).name
    shared = ADDRESS | {"worker-name": "gpu0"}
    assert WorkerOptions.of(shared, 7) == WorkerOptions.of(shared, 8)


def test_values_are_read():
    config = ADDRESS | {"worker-idle-s": "60", "worker-gpus": "0.5", "worker-name": "gpu0"}

    assert WorkerOptions.of(config, 7) == WorkerOptions(6390, "gpu0", 60.0, 0.5)
    assert WorkerOptions.of(ADDRESS, 7).gpus is None


@pytest.mark.parametrize(
    "address", ["6390", "10.0.0.5:6390", "0.0.0.0:6390", "127.0.0.1:", "127.0.0.1:70000", ":6390"]
)
def test_an_address_that_is_not_on_the_loopback_is_refused(address):
    with pytest.raises(WorkerOptionsError, match=r"expected 127\.0\.0\.1:PORT"):
        WorkerOptions.of({"worker": address}, 7)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("worker-idle-s", "0"),
        ("worker-idle-s", "soon"),
        ("worker-idle-s", "inf"),
        ("worker-gpus", "-1"),
        ("worker-gpus", "nan"),
        ("worker-name", "a/b"),
        ("worker-name", ""),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(key, value):
    with pytest.raises(WorkerOptionsError, match=f"^{key} in this node's"):
        WorkerOptions.of(ADDRESS | {key: value}, 7)
