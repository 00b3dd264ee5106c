"""Checks of settings against the base model and the data that they name."""

from collections.abc import Sequence

from hafl_app.config.overrides import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.run import build
from hafl_app.training.device import resolve_device
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.wire.node_profile import matches


def check_model_and_data(settings: Settings) -> None:
    """Reject target modules, ranks, data and partitions that do not fit the model or the method.

    Raises
    ------
    ValueError
        In one line: the value, the expected one, and the setting.
    """
    strategy = build.strategy(settings)
    resolve_device(settings.client.device)
    num_clients = settings.federation.num_clients
    tiers = build.client_tiers(settings, num_clients)
    strategy.check([rank for tier in tiers for rank in (tier.rank, *tier.rank_pattern.values())])
    text = build.federated_text(settings, num_clients)
    modules = adapter_shapes(build.model_spec(settings, len(text.label_names)))
    _check_rank_patterns(settings, list(modules))
    text.sizes()
    text.require_answers()


def _check_rank_patterns(settings: Settings, modules: Sequence[str]) -> None:
    # A node with such a pattern of its own is left out; here it is the user's typo.
    for pattern in (pattern for tier in settings.ranks.tiers for pattern in tier.rank_pattern):
        if not any(matches(pattern, name) for name in modules):
            raise SettingsError(
                f"ranks.tiers: rank_pattern {pattern!r} matches none of the {len(modules)} adapted "
                f"modules, such as {modules[-1]!r}"
            )
