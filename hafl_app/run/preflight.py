"""Preflight: check settings, model and data before anything starts."""

from hafl_app.config.schema import Settings
from hafl_app.run import build
from hafl_app.run.checks import check_settings
from hafl_app.server.compatibility import private_division
from hafl_app.training.base_model import locate
from hafl_app.training.device import resolve_device
from hafl_app.training.lora_model import adapter_shapes


def check(settings: Settings) -> None:
    """Reject settings that cannot work: base model, target modules, data, partitions, ranks.

    Raises
    ------
    ValueError
        In one line: the value, the expected one, and the setting.
    """
    check_settings(settings)
    strategy = build.strategy(settings)
    if settings.privacy.kind == "central_dp":
        private_division(strategy)
    resolve_device(settings.client.device)
    num_clients = settings.federation.num_clients
    tiers = build.client_tiers(settings, num_clients)
    strategy.check([rank for tier in tiers for rank in (tier.rank, *tier.rank_pattern.values())])
    spec = build.base_spec(settings)
    if not (spec.random_weights and not spec.path):
        locate(spec)
    text = build.federated_text(settings, num_clients)
    adapter_shapes(build.model_spec(settings, len(text.label_names)))
    text.sizes()
    text.require_answers()
