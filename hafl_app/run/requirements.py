"""Optional packages that settings need, looked for before anything starts."""

import importlib.util

from hafl_app.config.schema import Settings
from hafl_app.training.answers import MissingPackageError, require_rouge
from hafl_app.training.quantization.precisions import BLOCKWISE, require_library


def check_packages(settings: Settings, *, nodes_too: bool) -> None:
    """Refuse settings that need a package which is not installed.

    Parameters
    ----------
    nodes_too
        Whether the nodes run in this environment too; otherwise what the server needs counts.

    Raises
    ------
    MissingPackageError, hafl_app.training.quantization.precisions.QuantizationError
        In one line, with the command that installs it.
    """
    if settings.federation.generate_examples:
        require_rouge()
    quantization = settings.model.quantization
    if nodes_too or (settings.federation.central_evaluation and quantization != BLOCKWISE):
        require_library(quantization)
    if settings.tracking.kind == "wandb" and importlib.util.find_spec("wandb") is None:
        raise MissingPackageError(
            "tracking=wandb needs the package wandb: pip install -e . in the checkout"
        )
