"""Settings of a run as plain values: what its files, its trackers and its checkpoints keep."""

from dataclasses import asdict
from typing import Any

from hafl_app.config.compose import strategy_arguments
from hafl_app.config.schema import Settings


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Return a run's settings as plain values, the strategy with its ``_target_``.

    The comparison that the run may belong to is left out: it decides nothing in the run.
    """
    method = type(settings.strategy)
    strategy = {
        "_target_": f"{method.__module__}.{method.__qualname__}",
        **strategy_arguments(settings),
    }
    rest = {k: v for k, v in vars(settings).items() if k not in {"strategy", "compare"}}
    plain = {k: asdict(v) if hasattr(v, "__dataclass_fields__") else v for k, v in rest.items()}
    return {"strategy": strategy, **plain}
