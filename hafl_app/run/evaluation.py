"""Central evaluation: adapters on the server's own data, and the answers that they write."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hafl_app.config.schema import Settings
from hafl_app.data.conversations import as_text
from hafl_app.data.shares import CentralText
from hafl_app.data.text import EncodedText
from hafl_app.heads.solve import ValidationFeatures
from hafl_app.lowrank.factors import Adapter
from hafl_app.metrics import TASKS, Choice
from hafl_app.run import build
from hafl_app.run.watched_prompts import WatchedPrompt, watched_prompts
from hafl_app.training.device import threads
from hafl_app.training.evaluate import Scores, adapter_evaluator, scores_by_category
from hafl_app.training.features import features_of
from hafl_app.training.generate import GenerationOptions, score_generation, write_answers
from hafl_app.training.lora_model import LoraModel


class CentralEvaluation:
    """Evaluates adapters on the server's data; the base model is loaded at the first use.

    Parameters
    ----------
    settings
        Of the run.
    text
        The server's data.
    initial_head
        Head of an adapter that has none, by parameter name.
    """

    def __init__(
        self, settings: Settings, text: CentralText, initial_head: Mapping[str, Tensor]
    ) -> None:
        self._settings = settings
        # Not one for each CPU of the machine: it may be busy, and float sums differ by threads.
        self._num_threads = settings.federation.server_threads or settings.client.num_threads
        self.text = text
        self.initial_head = initial_head
        self._last_test: tuple[Adapter, Scores] | None = None

    @property
    def has_test(self) -> bool:
        """Whether the server evaluates adapters on test data."""
        return self._settings.federation.central_evaluation and len(self.text.test) > 0

    @property
    def of_rounds(self) -> bool:
        """Whether the adapters of rounds are evaluated; local heads leave no global model."""
        settings = self._settings
        return settings.federation.central_evaluation and settings.model.head != "local"

    @property
    def chooses_best(self) -> bool:
        """Whether there is validation data to choose the best round by."""
        return self.of_rounds and len(self.text.validation) > 0

    @cached_property
    def choice(self) -> Choice:
        """By what of the validation rows the best round is chosen."""
        labels = Counter(self.text.validation.labels.tolist())
        task = TASKS[self._settings.model.task]
        return Choice.by_validation(task, labels.values(), len(self.text.label_names) or 1)

    def metrics(self, adapter: Adapter, splits: Iterable[str]) -> dict[str, float]:
        """Return an adapter's metrics as ``split/name``.

        Parameters
        ----------
        splits
            ``test``, ``validation``; one without rows is left out.
        """
        found: dict[str, float] = {}
        for split in splits:
            if len(getattr(self.text, split)):
                found |= self._score_on(adapter, split).named(split)
        return found

    def categories(self, adapter: Adapter) -> dict[str, dict[str, float]]:
        """Return an adapter's test scores by category of the data; empty where there are none.

        No further pass over the test data for the adapter that was scored on them last.
        """
        if not self.has_test or len(self.text.label_names) < 2:
            return {}
        scores = self._score_on(adapter, "test")
        return scores_by_category(scores, self.text.test.labels, self.text.label_names)

    @cached_property
    def watched(self) -> Sequence[WatchedPrompt]:
        """The prompts that are answered after each round that is evaluated.

        Raises
        ------
        hafl_app.config.compose.SettingsError
            If one of the settings leaves no room for an answer.
        """
        # Not counted where nothing is scored: such a server may be unable to tokenize.
        return watched_prompts(self._settings, len(self.text.test) if self.has_test else 0)

    def answers(self, adapter: Adapter) -> list[dict[str, str]]:
        """Return each watched prompt with what is known of it, and an adapter's answer."""
        if not self.watched:
            return []
        settings = self._settings
        options = GenerationOptions(
            settings.dataset.max_length,
            settings.federation.watch_tokens,
            precision=settings.client.precision,
        )
        prompts = [one.prompt for one in self.watched]
        with threads(self._num_threads):
            self._model.load_whole(adapter)
            written = write_answers(self._model, build.base_spec(settings), prompts, options)
        return [
            {**asdict(one), "prompt": as_text(one.prompt), "answer": written.texts[row]}
            for row, one in enumerate(self.watched)
        ]

    def primary_test_metric(self, adapter: Adapter) -> float:
        """Return an adapter's primary metric on the test data."""
        key = TASKS[self._settings.model.task].primary.key("test")
        return self._score_on(adapter, "test").named("test")[key]

    def validation_features(self, adapter: Adapter) -> ValidationFeatures:
        """Return the features of the validation rows under an adapter, as clients sum them up."""
        settings, text = self._settings, self.text.validation
        with threads(self._num_threads):
            self._model.load_whole(adapter)
            features = features_of(
                self._model,
                text,
                settings.model.closed_form,
                precision=settings.client.precision,
                seed=settings.seed,
            )
        return ValidationFeatures(features, torch.from_numpy(text.labels))

    def generation(self, adapter: Adapter) -> dict[str, Any]:
        """Return the scores of answers that an adapter writes; empty if none are requested.

        With ``by_category`` where the data have categories.
        """
        settings = self._settings
        if not settings.federation.generate_examples or not self.has_test:
            return {}
        options = GenerationOptions(
            settings.dataset.max_length,
            settings.federation.generate_tokens,
            settings.federation.generate_examples,
            precision=settings.client.precision,
        )
        base, pairs = build.base_spec(settings), build.test_pairs(settings)
        with threads(self._num_threads):
            self._model.load_whole(adapter)
            scores = score_generation(
                *(self._model, base, pairs.prompts, pairs.answers, options),
                pairs.categories if len(set(pairs.categories)) > 1 else (),
            )
        categories = scores.categories()
        return {**scores.to_json(), **({"by_category": categories} if categories else {})}

    @cached_property
    def _model(self) -> LoraModel:
        # Not before it is needed: a server that evaluates nothing needs no base model.
        return build.model(self._settings, len(self.text.label_names))

    @cached_property
    def _evaluator(self) -> Callable[[Adapter, EncodedText], Scores]:
        return adapter_evaluator(self._model, self._settings.client.precision)

    def _score_on(self, adapter: Adapter, split: str) -> Scores:
        if split == "test" and self._last_test is not None and self._last_test[0] is adapter:
            return self._last_test[1]
        with threads(self._num_threads):
            scores = self._evaluator(adapter, getattr(self.text, split))
        if split == "test":
            self._last_test = adapter, scores
        return scores
