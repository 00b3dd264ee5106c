"""Prompts that the global adapter answers after every round: what the numbers of a run look like.

They choose nothing. The model is asked for its most probable tokens, so that an answer differs
from that of the round before because the adapter does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hafl_app.config.compose import SettingsError
from hafl_app.config.schema import Settings
from hafl_app.data.conversations import typed_prompt
from hafl_app.data.text import Prompt
from hafl_app.metrics import CAUSAL_LM
from hafl_app.run import build
from hafl_app.training.prompts import prompt_tokens

_BY_ITSELF: Final = 3  # prompts that a run watches without being asked


@dataclass(frozen=True)
class WatchedPrompt:
    """A prompt, as the model reads it.

    Parameters
    ----------
    prompt
        With the template around it, or as a conversation.
    expected
        The answer in the test set; empty for a prompt of the settings.
    category
        In the test set; empty where there is one category, or none.
    """

    prompt: Prompt
    expected: str = ""
    category: str = ""


def num_watched(settings: Settings, test_rows: int) -> int:
    """Return how many prompts are watched, without reading any.

    Parameters
    ----------
    test_rows
        Of the server.
    """
    federation, model = settings.federation, settings.model
    if model.task != CAUSAL_LM.name or not federation.central_evaluation:
        return 0
    if federation.watch_prompts is not None:
        return len(federation.watch_prompts)
    return 0 if model.random_weights else min(_BY_ITSELF, test_rows)


def watched_prompts(settings: Settings, test_rows: int) -> list[WatchedPrompt]:
    """Return the prompts that a run watches.

    Those of the settings, in the template's first column; without any the first of the test set
    that leave room for an answer, of different categories where there are some.

    Parameters
    ----------
    test_rows
        Of the server.

    Raises
    ------
    SettingsError
        If a prompt of the settings leaves no room for an answer.
    hafl_app.data.errors.DataError
        If the test set cannot be read.
    """
    if not (count := num_watched(settings, test_rows)):
        return []
    own = settings.federation.watch_prompts
    return _of_test_set(settings, count) if own is None else _of_settings(settings, own)


def _of_settings(settings: Settings, prompts: Sequence[str]) -> list[WatchedPrompt]:
    dataset = settings.dataset
    found = [
        WatchedPrompt(
            typed_prompt(
                prompt,
                kind=dataset.format,
                template=dataset.template,
                system_prompt=dataset.system_prompt,
            )
        )
        for prompt in prompts
    ]
    for prompt, watched in zip(prompts, found, strict=True):
        if not _has_room(settings, watched.prompt):
            raise SettingsError(
                f"federation.watch_prompts: {prompt[:60]!r} leaves no room for an answer within "
                f"dataset.max_length={settings.dataset.max_length} tokens"
            )
    return found


def _of_test_set(settings: Settings, count: int) -> list[WatchedPrompt]:
    pairs = build.test_pairs(settings)
    names = pairs.categories if len(set(pairs.categories)) > 1 else [""] * len(pairs.prompts)
    rows = [WatchedPrompt(*row) for row in zip(pairs.prompts, pairs.answers, names, strict=True)]
    found: list[WatchedPrompt] = []
    others: list[WatchedPrompt] = []  # of a category that is there already
    for row in rows:
        if len(found) == count:
            break
        is_new = not row.category or row.category not in {one.category for one in found}
        if not is_new and len(others) >= count:
            continue
        if _has_room(settings, row.prompt):
            (found if is_new else others).append(row)
    return [*found, *others][:count]


def _has_room(settings: Settings, prompt: Prompt) -> bool:
    return bool(prompt_tokens(build.base_spec(settings), prompt, settings.dataset.max_length))
