"""Preflight: check settings, packages, model and data before anything starts.

What needs neither the model nor the data is checked first, without torch, so that a typo is
reported within seconds. `hafl doctor` asks the same checks, and says more of what they find.
"""

from hafl_app.config.overrides import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.data.folders import resolve
from hafl_app.run.checks import check_settings
from hafl_app.run.environment import require_environment
from hafl_app.run.requirements import check_packages
from hafl_app.training.locate import locate
from hafl_app.training.quantization.precisions import BLOCKWISE


def check(settings: Settings) -> None:
    """Reject settings that cannot work: base model, target modules, data, partitions, ranks.

    Raises
    ------
    ValueError
        In one line: the value, the expected one, and the setting.
    """
    check_first(settings)
    from hafl_app.run.model_and_data import check_model_and_data  # noqa: PLC0415  imports torch

    check_model_and_data(settings)


def check_first(settings: Settings) -> None:
    """Reject what is wrong by the settings alone, or names a file or package that is not there.

    Raises
    ------
    ValueError
        See `check`.
    """
    check_settings(settings)
    _check_block_budget(settings)
    require_environment(settings)
    check_packages(settings, nodes_too=True)
    if settings.privacy.kind == "central_dp":
        # Here, because it imports torch, as the method's class has by now.
        from hafl_app.server.compatibility import private_division  # noqa: PLC0415

        private_division(settings.strategy)
    for name in ("path", "test_path"):
        if path := getattr(settings.dataset, name):
            resolve(path, f"dataset.{name}")
    if not settings.model.is_without_files:
        locate(settings.model)


def _check_block_budget(settings: Settings) -> None:
    # A node of a deployment may state its own budget; the nodes of a simulation cannot.
    model = settings.model
    if model.quantization == BLOCKWISE and model.memory_budget_mb is None:
        raise SettingsError(
            "model.quantization=blockwise needs a budget: model.memory_budget_mb=..., the MB that "
            "the base model may take on a client"
        )
