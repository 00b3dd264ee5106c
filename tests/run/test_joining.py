"""Nodes that come to a run that has begun."""

import pytest
from flwr.app import MessageType
from running import records, run_tiny

from hafl_app.engines.in_process import InProcessGrid

pytestmark = pytest.mark.slow

JOINS_IN, NEWCOMER, RANK = 7, 5, 3
EIGHT_ROUNDS = (
    "federation.num_rounds=8",
    "federation.start_timeout_s=1",
    "federation.fraction_evaluate=0",
    "federation.alone_clients_per_rank=0",
    "client.max_steps=1",
    "lora.max_rank=3",
    "ranks=homogeneous",
)


class LateGrid(InProcessGrid):
    """The last node connects in the seventh round, with the rank of the others."""

    rank = RANK

    def __init__(self, *args):
        super().__init__(*args)
        self._contexts[NEWCOMER].node_config["rank"] = self.rank
        self.trainings = 0

    def get_node_ids(self):
        here = self.trainings >= JOINS_IN - 1
        return [node_id for node_id in super().get_node_ids() if here or node_id != NEWCOMER]

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.trainings += any(m.metadata.message_type == MessageType.TRAIN for m in messages)
        return super().send_and_receive(messages, timeout=timeout)


class OtherRankGrid(LateGrid):
    rank = RANK - 1


def rounds_of_newcomer(folder):
    return [c["server_round"] for c in records(folder, "client") if c["node_id"] == NEWCOMER]


@pytest.mark.parametrize("strategy", ["fedit", "hafl"])
def test_it_takes_part_from_the_round_in_which_it_comes(tmp_path, strategy):
    summary = run_tiny(tmp_path / "a", *EIGHT_ROUNDS, f"strategy={strategy}", grid_type=LateGrid)

    assert rounds_of_newcomer(tmp_path / "a") == [7, 8]
    assert [node["rank"] for node in summary["nodes"]] == [RANK] * 5
    assert all(node["memory_free_mb"] > 0 for node in summary["nodes"])


def test_one_that_the_method_cannot_serve_is_left_out_and_the_run_goes_on(tmp_path):
    summary = run_tiny(tmp_path / "a", *EIGHT_ROUNDS, "strategy=fedit", grid_type=OtherRankGrid)

    assert rounds_of_newcomer(tmp_path / "a") == []
    assert summary["rounds"] == 8
    assert "one rank for all clients, got [2, 3]" in summary["left_out"][str(NEWCOMER)]


def test_another_rank_is_served_where_the_method_can(tmp_path):
    run_tiny(tmp_path / "a", *EIGHT_ROUNDS, "strategy=zero_padding", grid_type=OtherRankGrid)

    assert rounds_of_newcomer(tmp_path / "a") == [7, 8]
