"""Adapters in a run's folder: saved with what is to be known of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from hafl_app.config.schema import Settings
from hafl_app.data.conversations import prompt_facts
from hafl_app.lowrank.factors import Adapter
from hafl_app.run import build
from hafl_app.run.plain_settings import plain_settings
from hafl_app.tracking.base import RoundRecord
from hafl_app.training.adapter_files import save_adapter
from hafl_app.training.locate import weights_note


def save_of_round(
    folder: Path,
    adapter: Adapter,
    record: RoundRecord,
    settings: Settings,
    label_names: Sequence[str],
    heads_by_rank: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> None:
    """Save the global adapter of a round, head included.

    Parameters
    ----------
    folder
        Of the adapter.
    record
        Of its round.
    heads_by_rank
        See `hafl_app.training.adapter_files.StoredAdapter`.
    """
    save_adapter(
        folder,
        adapter,
        build.model_spec(settings, len(label_names)),
        label_names=label_names,
        max_length=settings.dataset.max_length,
        heads_by_rank=heads_by_rank,
        facts={
            "server_round": record.server_round,
            "metrics": dict(record.metrics),
            "head": settings.model.head,
            "strategy": plain_settings(settings)["strategy"],
            "seed": settings.seed,
            **prompt_facts(settings.dataset),
            "base_weights": weights_note(settings.model),
        },
    )
