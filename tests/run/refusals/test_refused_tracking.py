import pytest
from refused_settings import refusal

REFUSED = [
    (
        ["tracking=mlflow", "tracking.uri=https://me:open-sesame@host"],
        "tracking.uri: it names a user or a password; give them as MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD in the environment",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=lambda value: str(value)[:60])
def test_is_refused_in_one_line(overrides, line):
    assert refusal(*overrides) == line
