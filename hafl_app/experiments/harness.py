"""The benchmarks of EleutherAI's ``lm-eval`` on an adapted model, where it is installed."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from hafl_app.config.compose import SettingsError
from hafl_app.training.base import BaseSpec, hub_tokeniser
from hafl_app.training.lora_model import LoraModel


def require_harness() -> None:
    """Refuse in one line where ``lm-eval`` is not installed.

    Raises
    ------
    hafl_app.config.compose.SettingsError
        If it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise SettingsError("tasks= needs the package lm-eval: pip install 'lm-eval[hf]'")


def run_tasks(
    model: LoraModel, base: BaseSpec, tasks: Sequence[str], limit: int | None
) -> dict[str, dict[str, Any]]:
    """Run benchmarks with the factors that the model holds now.

    Parameters
    ----------
    tasks
        By their names in ``lm-eval``.
    limit
        Examples of each, at least 1; None is all.

    Returns
    -------
    dict
        Task to scores, as ``lm-eval`` names them.

    Raises
    ------
    hafl_app.config.compose.SettingsError
        If ``lm-eval`` is not installed, or the model has no tokenizer.
    """
    require_harness()
    if base.is_without_files:
        raise SettingsError("tasks=: a model without files has no tokenizer that lm-eval can use")
    from lm_eval import simple_evaluate  # noqa: PLC0415  optional
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    wrapped = HFLM(pretrained=model.base, tokenizer=hub_tokeniser(base), batch_size=8)
    results = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)["results"]
    return {task: dict(scores) for task, scores in results.items()}
