import pytest
from refused_settings import LONE_OFF, SCAFFOLD, refusal

from hafl_app.run.refusals.rounds import SCAFFOLD_NEEDS, STREAMING_NEEDS

NEW = "it makes new components in every round, of which those before say nothing"
WHOLE_ROUND = "it compares all replies of a round, and streaming drops each at once"
NO_BITS = (
    "federation.upload=mixed: only strategy=haflq gives every component its bits; expected fp32, "
    "bf16 or int8"
)
REFUSED = [
    (["strategy=hafl", "federation.upload=mixed"], NO_BITS),
    (["strategy=flexlora", "federation.upload=mixed"], NO_BITS),
    (
        ["federation.streaming=true", "federation.max_norm_ratio=null", "federation.robust=median"],
        f"federation.streaming=true needs federation.robust=none, not median: {WHOLE_ROUND}",
    ),
    (
        ["federation.streaming=true", "federation.max_norm_ratio=5"],
        f"federation.streaming=true needs federation.max_norm_ratio=null, not 5.0: {WHOLE_ROUND}",
    ),
    (
        ["federation.streaming=true", "federation.max_norm_ratio=null", "federation.clip_ratio=2"],
        f"federation.streaming=true needs federation.clip_ratio=null, not 2.0: {WHOLE_ROUND}",
    ),
    (
        ["strategy=flexlora_change", "federation.server_optimizer.kind=adam"],
        f"federation.server_optimizer.kind=adam is refused for strategy=flexlora: {NEW}",
    ),
    (
        ["strategy=fedex_lora", "federation.server_optimizer.kind=momentum"],
        "federation.server_optimizer.kind=momentum is refused for strategy=fedex_lora: it merges "
        "into the base what the mean of a round lacks, which another step belies",
    ),
    (
        ["strategy=hafl", "federation.server_optimizer.learning_rate=0.1"],
        "federation.server_optimizer.learning_rate=0.1 has no effect with "
        "federation.server_optimizer.kind=none, expected momentum or adam or yogi",
    ),
    (
        ["federation.server_optimizer.kind=momentum", "federation.server_optimizer.tau=0.1"],
        "federation.server_optimizer.tau=0.1 has no effect with "
        "federation.server_optimizer.kind=momentum, expected adam or yogi",
    ),
    (
        ["strategy=flora", *SCAFFOLD],
        "federation.scaffold=true is refused for strategy=flora: it merges into the base what the "
        "mean of a round lacks, which another step belies",
    ),
    *(
        (
            [*SCAFFOLD, f"{name}={value}", *others],
            f"federation.scaffold=true needs {name}={off}, not {value}: {SCAFFOLD_NEEDS[name][1]}",
        )
        for name, off, value, *others in (
            ("client.optimizer", "sgd", "adamw"),
            ("client.max_grad_norm", "0.0", "1.0"),
            ("client.weight_decay", "0.0", "0.1"),
            ("client.proximal", "0.0", "0.1"),
            ("lora.scaling", "constant", "rslora"),
            ("federation.upload", "fp32", "int8"),
            ("federation.clip_ratio", "null", "2.0"),
            ("federation.robust", "none", "median"),
            ("privacy.kind", "none", "local_dp", "federation.fraction_evaluate=0", *LONE_OFF),
        )
    ),
    (
        ["client.schedule.warmup_rounds=2"],
        "client.schedule.warmup_rounds=2: expected below federation.num_rounds=2, else no round "
        "has client.learning_rate",
    ),
    *(
        (
            ["federation.early_stopping.patience=3", *others],
            "federation.early_stopping.patience=3: neither the server nor the clients score rounds "
            "that it could stop by; expected 0, or dataset.validation_fraction above 0 with "
            "federation.central_evaluation=true",
        )
        for others in (
            ["dataset.validation_fraction=0", "federation.fraction_evaluate=0"],
            ["federation.central_evaluation=false", "dataset.holdout_fraction=0"],
            [
                *("dataset.validation_fraction=0", "privacy=central_dp"),
                *("federation.max_retries=0", "federation.max_norm_ratio=null"),
            ],
        )
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=lambda value: str(value)[:60])
def test_is_refused_in_one_line(overrides, line):
    assert refusal(*overrides) == line


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        ("federation.streaming=true needs", STREAMING_NEEDS),
        ("federation.scaffold=true needs", SCAFFOLD_NEEDS),
    ],
)
def test_the_table_has_every_need(words, needs):
    of_table = [line for _, line in REFUSED if words in line]
    assert len(of_table) == len(needs)
    assert all(any(f"{name}=" in line for line in of_table) for name in needs)
