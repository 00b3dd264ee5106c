"""What simulated devices and their clock cannot go with."""

from collections.abc import Iterator

from hafl_app.config.schema import Settings
from hafl_app.server.devices import DevicesSettings
from hafl_app.training.settings import CLOSED_FORM


def refusals(settings: Settings) -> Iterator[str]:
    """Refuse what needs a clock without one, clients without a device, and other time limits."""
    devices, none = settings.devices, DevicesSettings()
    if not devices.classes:
        for name in ("assign", "deadline_s", "jitter", "target"):
            if (value := getattr(devices, name)) != getattr(none, name):
                yield f"devices.{name}={value}: devices=none has no clock; expected devices=mixed"
        return
    if settings.privacy.kind != "none":
        yield (
            f"devices: refused under privacy={settings.privacy.kind}, because the clock follows "
            "from the lengths of the clients' texts, and carries no noise"
        )
    if settings.model.head == CLOSED_FORM:
        yield (
            f"model.head={CLOSED_FORM}: the clock of devices counts no sums of features; "
            "expected devices=none"
        )
    if settings.client.max_seconds:
        yield (
            f"client.max_seconds={settings.client.max_seconds:g}: seconds of this machine, not of "
            "the clock of devices; expected 0, devices.deadline_s ends the wait for stragglers"
        )
    if devices.assign == "rank" and settings.ranks.source == "tiers":
        for tier in settings.ranks.tiers:
            rank = max(tier.rank, *tier.rank_pattern.values(), 1)
            if devices.class_of_rank(rank) is None:
                yield no_class_for(rank)


def no_class_for(rank: int) -> str:
    """Return the line that refuses a rank that no class of devices affords."""
    return (
        f"devices: no class affords rank {rank}; expected one whose up_to_rank is null or at least "
        f"{rank}, or devices.assign=share"
    )
