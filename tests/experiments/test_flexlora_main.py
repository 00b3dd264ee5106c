"""FlexLoRA's main experiment on a few tasks, with a tiny model: all its parts are there."""

import json

import pytest

from hafl_app.engines.in_process import run_federation
from hafl_app.server.held_out_clients import draw_unseen

pytestmark = pytest.mark.slow

CLIENTS, UNSEEN = 5, 1


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("natural_instructions")
    tasks = folder / "tasks"
    tasks.mkdir()
    for number in range(CLIENTS):
        rows = [{"input": f"word {i}", "output": [f"yes {i % 3}"]} for i in range(30 + number)]
        task = {"Definition": [f"Say task {number}."], "Instances": rows}
        (tasks / f"task{number:03}_say.json").write_text(json.dumps(task))
    run_federation(
        [
            "experiment=flexlora_natural_instructions",
            f"dataset.path={tasks}",
            "dataset.max_length=32",
            "dataset.task_fraction=1",  # a tenth of these small tasks is too little for a client
            "model=tiny_random_causal",
            f"federation.num_clients={CLIENTS}",
            f"federation.unseen_clients={UNSEEN}",
            "federation.num_rounds=1",
            "federation.fraction_train=1",
            "federation.generate_examples=3",
            "federation.generate_tokens=4",
            "federation.cohort=1",
            "ranks.order=ascending",
            f"output_dir={folder / 'run'}",
        ]
    )
    return json.loads((folder / "run" / "summary.json").read_text())


def test_a_client_has_a_task_and_one_of_the_four_resource_types(summary):
    assert sorted(node["partition_id"] for node in summary["nodes"]) == list(range(CLIENTS))
    assert {node["rank"] for node in summary["nodes"]} == {8, 30, 200}


def test_one_task_is_of_a_client_that_never_trained(summary):
    (unseen,) = draw_unseen(CLIENTS, UNSEEN, seed=0)

    assert summary["clients"]["unseen"]["partitions"] == [unseen]
    assert summary["clients"]["unseen"]["perplexity"] > 1


def test_the_last_adapter_has_a_rouge_l(summary):
    assert 0 <= summary["generation"]["rouge-l"] <= 1
    assert summary["generation"]["num_examples"] == 3
