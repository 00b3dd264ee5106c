"""Optional packages that settings need, looked for before anything starts."""

from hafl_app.config.schema import Settings
from hafl_app.packages import require
from hafl_app.tracking.settings import PACKAGES
from hafl_app.training.answers import require_rouge
from hafl_app.training.quantization.precisions import BLOCKWISE, require_library


def check_packages(settings: Settings, *, nodes_too: bool) -> None:
    """Refuse settings that need a package which is not installed.

    Parameters
    ----------
    nodes_too
        Whether the nodes run in this environment too; otherwise what the server needs counts.

    Raises
    ------
    hafl_app.packages.MissingPackageError
    hafl_app.training.quantization.precisions.QuantizationError
        In one line, with the command that installs it.
    """
    federation = settings.federation
    if federation.generate_examples or (nodes_too and federation.generate_on_clients):
        require_rouge()
    quantization = settings.model.quantization
    if nodes_too or (federation.central_evaluation and quantization != BLOCKWISE):
        require_library(quantization)
    for name in settings.tracking.chosen:
        require(PACKAGES.get(name, name), f"tracking={name}")
