"""What is not written where a run is tracked."""

from collections.abc import Iterator

from hafl_app.config.schema import Settings
from hafl_app.printable import without_credentials


def refusals(settings: Settings) -> Iterator[str]:
    """Refuse passwords in an address: settings are written into files, and logged."""
    uri = settings.tracking.uri or ""
    if uri != without_credentials(uri):
        yield (
            "tracking.uri: it names a user or a password; give them as MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD in the environment"
        )
