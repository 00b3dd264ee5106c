import pytest
from refused_settings import LOCAL_DP, refusal

COHORT = "federation.cohort={}{}"
TOGETHER = ("engine=inprocess", "federation.cohort=4")
REFUSED = [
    (["federation.cohort=many"], COHORT.format("many", ": expected auto or a whole number from 1")),
    (["federation.cohort=0"], COHORT.format("0", ": expected auto or a whole number from 1")),
    (["federation.cohort=1.5"], COHORT.format("1.5", ": expected auto or a whole number from 1")),
    (
        ["federation.cohort=4", "federation.client_gpus=0.5"],
        COHORT.format(
            "4",
            " needs federation.client_gpus=null, not 0.5: one process for each GPU, or one on the "
            "CPU, trains them all",
        ),
    ),
    (
        ["federation.cohort=4", "federation.client_cpus=2"],
        COHORT.format(
            "4",
            " needs federation.client_cpus=null, not 2: one process for each GPU, or one on the "
            "CPU, trains them all",
        ),
    ),
    (
        ["federation.cohort=4", "federation.ray_address=10.0.0.1:6379"],
        COHORT.format("4", " needs federation.ray_address=null: it takes a Ray of the run's own"),
    ),
    (
        [*TOGETHER, "client.max_seconds=5"],
        COHORT.format("4", " needs client.max_seconds=0: a time limit is each client's own"),
    ),
    (
        [*TOGETHER, "client.micro_batch_size=2"],
        COHORT.format("4", " needs client.micro_batch_size=null: memory is short then"),
    ),
    (
        [*TOGETHER, "lora.lora_dropout=0.1"],
        COHORT.format("4", " needs lora.lora_dropout=0: the masks would be others than alone"),
    ),
    (
        [*TOGETHER, "model.dropout=true"],
        COHORT.format("4", " needs model.dropout=false: the masks would be others than alone"),
    ),
    (
        [*TOGETHER, *LOCAL_DP],
        COHORT.format(
            "4", ": under privacy=local_dp a node's noise depends on the last bit it uploads"
        ),
    ),
    (
        [*TOGETHER, "model.quantization=blockwise"],
        COHORT.format(
            "4", " needs another model.quantization: under blockwise every client has its own base"
        ),
    ),
    (
        [*TOGETHER, "strategy=ravan"],
        COHORT.format("4", ": clients of strategy=ravan train cores, each in a model of its own"),
    ),
    (
        ["engine=inprocess", "federation.ray_address='head:6379'"],
        "federation.ray_address: engine=inprocess uses no Ray; drop either",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=lambda value: str(value)[:60])
def test_is_refused_in_one_line(overrides, line):
    assert refusal(*overrides) == line
