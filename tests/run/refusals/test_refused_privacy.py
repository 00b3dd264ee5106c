import pytest
from refused_settings import SECURE, refusal

from hafl_app.run.refusals.privacy import PRIVACY_NEEDS, SECURE_NEEDS

CROSS_CLIENT = "because one client's upload would change how the others count"
ONE_RELEASE = "because a repeated round is one more release than epsilon counts"
SINGLE = "it needs single updates, and the server has their sums alone"
NO_CLIPPING = "clipping needs single updates, and noise is counted without sums"


def secure(needed, given, reason):
    return f"privacy.secure_aggregation=true needs {needed}, not {given}: {reason}"


REFUSED = [
    (
        ["privacy=central_dp", "federation.robust=median"],
        f"federation.robust=median: privacy=central_dp needs none, {CROSS_CLIENT}",
    ),
    (
        ["privacy=central_dp", "federation.clip_ratio=2"],
        f"federation.clip_ratio=2.0: privacy=central_dp needs null, {CROSS_CLIENT}; "
        "privacy.clip_norm clips",
    ),
    (
        ["privacy=central_dp", "federation.max_norm_ratio=10"],
        f"federation.max_norm_ratio=10.0: privacy=central_dp needs null, {CROSS_CLIENT}",
    ),
    (
        ["privacy=central_dp", "federation.min_replies=3"],
        "federation.min_replies=3: privacy=central_dp needs 1, because whether a round counts "
        "would tell how many took part",
    ),
    (
        ["privacy=central_dp", "federation.max_retries=2"],
        f"federation.max_retries=2: privacy=central_dp needs 0, {ONE_RELEASE}",
    ),
    (
        ["privacy=local_dp", "federation.fraction_evaluate=1"],
        "federation.fraction_evaluate=1.0: privacy=local_dp needs 0.0, because scores on private "
        "data would be uploaded without noise",
    ),
    (
        ["privacy=local_dp", "federation.alone_clients_per_rank=2"],
        "federation.alone_clients_per_rank=2: privacy=local_dp needs 0, because training alone is "
        "one more upload than epsilon counts",
    ),
    (
        ["privacy=local_dp", "federation.max_retries=1"],
        f"federation.max_retries=1: privacy=local_dp needs 0, {ONE_RELEASE}",
    ),
    ([*SECURE, "privacy.kind=local_dp"], secure("privacy.kind=none", "local_dp", NO_CLIPPING)),
    ([*SECURE, "federation.robust=median"], secure("federation.robust=none", "median", SINGLE)),
    (
        [*SECURE, "federation.max_norm_ratio=5"],
        secure("federation.max_norm_ratio=null", "5.0", SINGLE),
    ),
    ([*SECURE, "federation.clip_ratio=2"], secure("federation.clip_ratio=null", "2.0", SINGLE)),
    ([*SECURE, "federation.scaffold=true"], secure("federation.scaffold=False", "True", SINGLE)),
    (
        [*SECURE, "federation.streaming=true"],
        secure("federation.streaming=False", "True", "a sum is opened when all have answered"),
    ),
    (
        [*SECURE, "federation.upload=int8"],
        secure("federation.upload=fp32", "int8", "masked numbers cannot be rounded further"),
    ),
    (
        [*SECURE, "federation.alone_clients_per_rank=1"],
        secure(
            "federation.alone_clients_per_rank=0",
            "1",
            "who trains alone would upload without a mask",
        ),
    ),
    (
        [*SECURE, "model.head=closed_form"],
        "model.head=closed_form: refused with privacy.secure_aggregation=true, since sums of "
        "features are uploaded without masks; expected averaged, frozen or local",
    ),
    *(
        (
            ["privacy=secure_aggregation", *f"strategy={name}".split()],
            f"privacy.secure_aggregation=true is refused for strategy={name.split()[0]}: {reason}",
        )
        for name, reason in {
            "flexlora": "it needs single updates, not their sums",
            "flora": "it needs single updates, not their sums",
            "hetlora": "training decides the rank of an upload, after masks are agreed on: use "
            "strategy.pruning=false",
            "hafl": "its server scores single updates: use strategy.importance=magnitude, or "
            "strategy.selection=random or prefix",
            "hafl strategy.selection_by=client": "clients choose, and it divides by who has "
            "chosen a component, which is hidden: use strategy.aggregation=change "
            "strategy.coverage_exponent=1, or strategy.selection_by=server",
            "hafl_plus": "its server assigns components by what single updates contributed: use "
            "strategy.selection=random or prefix",
            "flasc": "where its uploads have numbers is not masked, and without it they are as "
            "large as all factors: use strategy=zero_padding",
            "fedara": "clients upload importance scores, one by one",
        }.items()
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=lambda value: str(value)[:60])
def test_is_refused_in_one_line(overrides, line):
    assert refusal(*overrides) == line


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        *((f"privacy={kind} needs", PRIVACY_NEEDS[kind]) for kind in PRIVACY_NEEDS),
        ("privacy.secure_aggregation=true needs", SECURE_NEEDS),
    ],
)
def test_the_table_has_every_need(words, needs):
    of_table = [line for _, line in REFUSED if words in line]
    assert len(of_table) == len(needs)
    assert all(any(f"{name}=" in line for line in of_table) for name in needs)
