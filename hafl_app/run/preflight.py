"""Preflight: check settings, packages, model and data before anything starts."""

from collections.abc import Sequence

from hafl_app.config.overrides import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.run import build
from hafl_app.run.checks import check_settings
from hafl_app.run.requirements import check_packages
from hafl_app.server.compatibility import private_division
from hafl_app.training.base_model import locate
from hafl_app.training.device import resolve_device
from hafl_app.training.lora_model import adapter_shapes
from hafl_app.training.quantization.block_precision import BLOCKWISE
from hafl_app.wire.node_profile import matches


def check(settings: Settings) -> None:
    """Reject settings that cannot work: base model, target modules, data, partitions, ranks.

    Raises
    ------
    ValueError
        In one line: the value, the expected one, and the setting.
    """
    check_settings(settings)
    _check_block_budget(settings)
    check_packages(settings, nodes_too=True)
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


def _check_block_budget(settings: Settings) -> None:
    # A node of a deployment may state its own budget; the nodes of a simulation cannot.
    model = settings.model
    if model.quantization == BLOCKWISE and model.memory_budget_mb is None:
        raise SettingsError(
            "model.quantization=blockwise needs a budget: model.memory_budget_mb=..., the MB that "
            "the base model may take on a client"
        )
