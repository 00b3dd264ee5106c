"""Simulated devices of a comparison: the same for all methods, or their times say nothing."""

from collections.abc import Mapping

from hafl_app.config.compose import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.run import build


def check_fleets(jobs: Mapping[tuple[str, str, int], Settings]) -> None:
    """Refuse a comparison whose methods would have other devices on the same seed.

    Parameters
    ----------
    jobs
        Settings of the runs, by cell, method and seed.

    Raises
    ------
    SettingsError
        In one line.
    """
    seen: dict[tuple[str, int], tuple[str, list[str]]] = {}
    for (cell, method, seed), settings in jobs.items():
        first, fleet = seen.setdefault((cell, seed), (method, _fleet(settings)))
        if fleet != _fleet(settings):
            raise SettingsError(
                f"devices.assign={settings.devices.assign}: {method} would have other devices than "
                f"{first}, because its ranks differ; expected devices.assign=share"
            )


def fleet_line(settings: Settings) -> str:
    """Return the footer's words on simulated devices; empty without any."""
    devices = settings.devices
    if not devices.classes:
        return ""
    parts = [f"on {', '.join(devices.classes)}, assigned by {devices.assign}"]
    if devices.deadline_s is not None:
        parts.append(f"deadline {devices.deadline_s:g} s")
    if devices.jitter:
        parts.append(f"jitter {devices.jitter:g}")
    if devices.target is not None:
        parts.append(f"target {devices.target:g}")
    return ", ".join(parts)


def _fleet(settings: Settings) -> list[str]:
    """Return the device of every client."""
    if not settings.devices.classes:
        return []
    tiers = build.client_tiers(settings, settings.federation.num_clients)
    ranks = [max(tier.rank, *tier.rank_pattern.values(), 1) for tier in tiers]
    return [build.device_name(settings, number, rank) for number, rank in enumerate(ranks)]
