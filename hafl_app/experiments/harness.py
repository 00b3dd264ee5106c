"""The benchmarks of EleutherAI's ``lm-eval`` on an adapted model, where it is installed."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hafl_app.config.compose import SettingsError
from hafl_app.data.errors import nearest
from hafl_app.packages import is_installed, missing
from hafl_app.training.base_model import hub_tokenizer
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.settings import BaseSpec


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse in one line, before anything is loaded, what ``lm-eval`` cannot run.

    Parameters
    ----------
    tasks
        Names that it knows, or YAML files of tasks of one's own.

    Raises
    ------
    hafl_app.config.compose.SettingsError
        If it is not installed, or a task is neither.
    """
    if not is_installed("lm-eval"):
        raise SettingsError(missing("lm-eval[hf]", "tasks="))
    known = _task_manager().task_index
    for task in tasks:
        if task not in known and not Path(task).is_file():
            raise SettingsError(
                f"tasks={task}: neither a task of lm-eval nor a YAML file{nearest(task, known)}"
            )


@functools.lru_cache(maxsize=1)
def _task_manager() -> Any:
    """Return the index of all tasks: thousands of files are read for it."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415  optional

    return TaskManager()


def run_tasks(
    model: LoraModel, base: BaseSpec, tasks: Sequence[str], limit: int | None
) -> dict[str, dict[str, Any]]:
    """Run benchmarks with the factors that the model holds now.

    Parameters
    ----------
    tasks
        As for `check_tasks`.
    limit
        Examples of each, at least 1; None is all.

    Returns
    -------
    dict
        Task to scores, as ``lm-eval`` names them.

    Raises
    ------
    hafl_app.config.compose.SettingsError
        If the model has no tokenizer.
    """
    if base.is_without_files:
        raise SettingsError("tasks=: a model without files has no tokenizer that lm-eval can use")
    from lm_eval import simple_evaluate  # noqa: PLC0415  optional
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    wrapped = HFLM(pretrained=model.base, tokenizer=hub_tokenizer(base), batch_size=8)
    results = simple_evaluate(
        model=wrapped, tasks=list(tasks), limit=limit, task_manager=_task_manager()
    )["results"]
    return {task: dict(scores) for task, scores in results.items()}
