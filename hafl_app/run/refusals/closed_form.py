"""What a head in closed form cannot do, or lacks."""

from collections.abc import Iterator

from hafl_app.config.schema import Settings
from hafl_app.data.combinations import ON_DEVICE
from hafl_app.metrics import CAUSAL_LM
from hafl_app.training.settings import CLOSED_FORM


def refusals(settings: Settings) -> Iterator[str]:
    """Yield a line for each combination that is refused."""
    federation, dataset, model = settings.federation, settings.dataset, settings.model
    if model.head != CLOSED_FORM:
        if not federation.num_rounds:
            yield (
                "federation.num_rounds=0: nothing is trained; expected at least 1, or "
                f"model.head={CLOSED_FORM}, which is solved before round 1"
            )
        return
    given = f"model.head={CLOSED_FORM}"
    if model.task == CAUSAL_LM.name:
        yield f"{given}: a causal language model has no head; expected averaged"
    if settings.privacy.kind != "none":
        yield (
            f"{given}: refused under privacy={settings.privacy.kind}, since sums of features are "
            "uploaded without noise; expected averaged, frozen or local"
        )
    if settings.privacy.secure_aggregation:
        yield (
            f"{given}: refused with privacy.secure_aggregation=true, since sums of features are "
            "uploaded without masks; expected averaged, frozen or local"
        )
    if federation.robust != "none":
        yield (
            f"{given}: refused with federation.robust={federation.robust}, since sums of features "
            "are added up; expected none"
        )
    if model.closed_form.chooses_on_validation:
        yield from _no_validation(settings)
    if model.asks_for_losses and not dataset.holdout_fraction:
        yield (
            "model.closed_form.temperature_by=clients: they score rows that they hold out; "
            "expected dataset.holdout_fraction above 0"
        )
    if not federation.num_rounds and model.closed_form.per_rank:
        yield (
            "model.closed_form.per_rank=true: with federation.num_rounds=0 there is no adapter to "
            "cut, all ranks have one head; expected false"
        )
    if not federation.num_rounds and federation.alone_clients_per_rank:
        yield (
            f"federation.alone_clients_per_rank={federation.alone_clients_per_rank}: with "
            "federation.num_rounds=0 nothing is trained; expected 0"
        )


def _no_validation(settings: Settings) -> Iterator[str]:
    """Yield what keeps the server from choosing ridge or temperature on validation data."""
    closed_form = settings.model.closed_form
    other = "temperature_by=clients, or a number as model.closed_form.temperature"
    if closed_form.temperature is not None or closed_form.temperature_by != "validation":
        other = "ridge_by=gcv, or a number as model.closed_form.ridge"
    expected = f"expected model.closed_form.{other}"
    if settings.dataset.source == ON_DEVICE:
        yield f"model.head={CLOSED_FORM}: dataset=on_device has no validation data; {expected}"
    elif not settings.dataset.validation_fraction:
        yield (
            f"model.head={CLOSED_FORM}: dataset.validation_fraction=0 leaves nothing to choose on; "
            f"{expected}"
        )
    elif not settings.federation.central_evaluation:
        yield (
            f"model.head={CLOSED_FORM}: with federation.central_evaluation=false the server has no "
            f"model to choose with; {expected}"
        )
