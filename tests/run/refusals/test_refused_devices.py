import pytest
from refused_settings import refusal

NO_CLOCK = "devices=none has no clock; expected devices=mixed"
REFUSED = [
    (["devices.deadline_s=3"], f"devices.deadline_s=3.0: {NO_CLOCK}"),
    (["devices.jitter=0.1"], f"devices.jitter=0.1: {NO_CLOCK}"),
    (["devices.target=0.8"], f"devices.target=0.8: {NO_CLOCK}"),
    (["devices.assign=share"], f"devices.assign=share: {NO_CLOCK}"),
    (
        [
            *("devices=mixed", "devices.classes.server_gpu.up_to_rank=6"),
            *("lora.max_rank=16", "ranks=two_to_sixteen"),
        ],
        "devices: no class affords rank 16; expected one whose up_to_rank is null or at least 16, "
        "or devices.assign=share",
    ),
    (
        ["devices=mixed", "privacy=central_dp", "strategy=zero_padding"],
        "devices: refused under privacy=central_dp, because the clock follows from the lengths of "
        "the clients' texts, and carries no noise",
    ),
    (
        ["devices=mixed", "model.head=closed_form", "strategy=zero_padding"],
        "model.head=closed_form: the clock of devices counts no sums of features; "
        "expected devices=none",
    ),
    (
        ["devices=mixed", "client.max_seconds=5"],
        "client.max_seconds=5: seconds of this machine, not of the clock of devices; expected 0, "
        "devices.deadline_s ends the wait for stragglers",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=lambda value: str(value)[:60])
def test_is_refused_in_one_line(overrides, line):
    assert refusal(*overrides) == line
