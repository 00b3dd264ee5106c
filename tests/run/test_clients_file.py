"""`clients.json`: who takes part and who does not, as it is while the run goes."""

import json

import pytest

from hafl_app.run.clients_file import ClientsFile
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.wire.node_profile import NodeProfile


@pytest.fixture
def directory():
    directory = NodeDirectory(1.0)
    for partition_id, rank in ((1, 4), (0, 2)):
        node_id = 70 + partition_id
        profile = NodeProfile(partition_id, 2, rank, 9 + partition_id, "cpu", node_id)
        directory.profiles[node_id] = profile
    return directory


def read(folder):
    return json.loads((folder / "clients.json").read_text())


def test_it_has_the_clients_in_partition_order_and_the_reasons_of_others(tmp_path, directory):
    directory.refuse(99, "it has\nno label")
    ClientsFile(tmp_path).update(directory)
    assert read(tmp_path) == {
        "clients": [
            {"node_id": 70, "partition_id": 0, "rank": 2, "examples": 9, "device": "cpu"},
            {"node_id": 71, "partition_id": 1, "rank": 4, "examples": 10, "device": "cpu"},
        ],
        "left_out": {"99": "it has no label"},
    }


def test_it_is_written_again_when_somebody_joins_or_is_left_out_and_not_else(tmp_path, directory):
    file = ClientsFile(tmp_path)
    file.update(directory)
    (tmp_path / "clients.json").unlink()
    file.update(directory)
    assert not (tmp_path / "clients.json").exists()
    directory.profiles[72] = NodeProfile(2, 3, 8, 5, "cpu", node_id=72)
    file.update(directory)
    assert [client["node_id"] for client in read(tmp_path)["clients"]] == [70, 71, 72]
    directory.refuse(72, "out of the room")
    file.update(directory)
    assert [client["node_id"] for client in read(tmp_path)["clients"]] == [70, 71]
