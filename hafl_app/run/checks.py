"""Settings that are refused, each in one line.

`hafl_app.run.refusals` has what two groups of settings cannot be together. What one value may be
is metadata of its field; what a method cannot serve is judged by its traits, in
`hafl_app.server.compatibility`; what the data or a node do not have is found where they are read.
"""

from types import ModuleType
from typing import Final

from hafl_app.config.compose import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.metrics import CAUSAL_LM
from hafl_app.run.refusals import (
    closed_form,
    devices,
    engine,
    evaluation,
    model_and_data,
    privacy,
    rounds,
    tracking,
)
from hafl_app.training.settings import CLOSED_FORM

_SUBJECTS: Final[tuple[ModuleType, ...]] = (
    privacy,
    model_and_data,
    closed_form,
    evaluation,
    rounds,
    tracking,
    engine,
    devices,
)


def check_settings(settings: Settings) -> None:
    """Refuse settings that do not go together.

    Raises
    ------
    SettingsError
        In one line: the first combination that is refused, and what would be accepted.
    """
    for refused in (line for subject in _SUBJECTS for line in subject.refusals(settings)):
        raise SettingsError(refused)


def check_comparison(settings: Settings, searches_rates: bool) -> None:
    """Refuse settings under which methods cannot be compared.

    Parameters
    ----------
    searches_rates
        Whether learning rates are searched for.

    Raises
    ------
    SettingsError
        In one line.
    """
    if settings.model.head == "local":
        raise SettingsError("model.head=local: there is no global model to compare")
    if searches_rates and not settings.dataset.validation_fraction:
        raise SettingsError("dataset.validation_fraction=0: nothing to tune on; add tune=false")


def check_centralized(settings: Settings) -> None:
    """Refuse settings under which all data in one place cannot be trained on.

    Raises
    ------
    SettingsError
        In one line.
    """
    if settings.model.head == CLOSED_FORM:
        raise SettingsError(
            f"model.head={CLOSED_FORM}: centralized training learns its head by gradients; "
            "expected averaged or frozen. The head alone of all data, which no partition changes: "
            f"scripts/simulate.py model.head={CLOSED_FORM} federation.num_rounds=0"
        )


def check_base_alone(settings: Settings) -> None:
    """Refuse to score a base model alone that cannot be.

    Raises
    ------
    SettingsError
        In one line.
    """
    if settings.model.task != CAUSAL_LM.name:
        raise SettingsError(
            f"adapter=none: only a model.task={CAUSAL_LM.name} can be scored alone, the head of a "
            f"{settings.model.task} model is trained with its adapter"
        )
    if settings.model.quantization == "blockwise":
        raise SettingsError(
            "model.quantization=blockwise: that is each client's own choice; expected none, "
            "int8 or nf4"
        )
