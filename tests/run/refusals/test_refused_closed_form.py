import pytest
from refused_settings import CAUSAL, CLOSED, LOCAL_DP, LONE_OFF, refusal

NO_NOISE = "since sums of features are uploaded without noise; expected averaged, frozen or local"
A_NUMBER = "a number as model.closed_form.temperature"
BY_CLIENTS = f"expected model.closed_form.temperature_by=clients, or {A_NUMBER}"
REFUSED = [
    (
        [*CAUSAL, CLOSED],
        f"{CLOSED}: a causal language model has no head; expected averaged",
    ),
    (
        ["strategy=zero_padding", "privacy=central_dp", CLOSED],
        f"{CLOSED}: refused under privacy=central_dp, {NO_NOISE}",
    ),
    ([*LOCAL_DP, CLOSED], f"{CLOSED}: refused under privacy=local_dp, {NO_NOISE}"),
    (
        ["federation.robust=median", CLOSED],
        f"{CLOSED}: refused with federation.robust=median, since sums of features are added up; "
        "expected none",
    ),
    (
        ["dataset.validation_fraction=0", CLOSED],
        f"{CLOSED}: dataset.validation_fraction=0 leaves nothing to choose on; {BY_CLIENTS}",
    ),
    (
        ["federation.central_evaluation=false", CLOSED],
        f"{CLOSED}: with federation.central_evaluation=false the server has no model to choose "
        f"with; {BY_CLIENTS}",
    ),
    (
        [
            *("dataset.validation_fraction=0", CLOSED, "model.closed_form.temperature=0.1"),
            "model.closed_form.ridge_by=validation",
        ],
        f"{CLOSED}: dataset.validation_fraction=0 leaves nothing to choose on; expected "
        "model.closed_form.ridge_by=gcv, or a number as model.closed_form.ridge",
    ),
    (
        [CLOSED, "federation.num_rounds=0", "model.closed_form.per_rank=true", *LONE_OFF],
        "model.closed_form.per_rank=true: with federation.num_rounds=0 there is no adapter to cut, "
        "all ranks have one head; expected false",
    ),
    (
        ["dataset=on_device", CLOSED],
        f"{CLOSED}: dataset=on_device has no validation data; {BY_CLIENTS}",
    ),
    (
        ["dataset.holdout_fraction=0", CLOSED, "model.closed_form.temperature_by=clients"],
        "model.closed_form.temperature_by=clients: they score rows that they hold out; expected "
        "dataset.holdout_fraction above 0",
    ),
    (
        ["federation.num_rounds=0"],
        "federation.num_rounds=0: nothing is trained; expected at least 1, or "
        "model.head=closed_form, which is solved before round 1",
    ),
    (
        ["federation.num_rounds=0", CLOSED, "federation.alone_clients_per_rank=1"],
        "federation.alone_clients_per_rank=1: with federation.num_rounds=0 nothing is trained; "
        "expected 0",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=lambda value: str(value)[:60])
def test_is_refused_in_one_line(overrides, line):
    assert refusal(*overrides) == line
