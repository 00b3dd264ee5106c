"""Answers of a saved adapter, of its base model alone, and of the adapter cut to smaller ranks."""

from collections.abc import Iterator
from pathlib import Path

import torch

from hafl_app.data.conversations import typed_prompt
from hafl_app.experiments.chat_request import BASE, WHOLE, ChatRequest
from hafl_app.lowrank.factors import Adapter
from hafl_app.publishing.run_facts import read_run
from hafl_app.publishing.truncation import truncate_adapter
from hafl_app.training.adapter_files import StoredAdapter, load_adapter, read_adapter
from hafl_app.training.causal import LoraCausalLM
from hafl_app.training.chat_template import Conversation
from hafl_app.training.device import resolve_device
from hafl_app.training.generate import (
    GenerationOptions,
    answer_codec,
    written_answers,
)
from hafl_app.training.prompts import Prompt, prompt_tokens


class PromptError(ValueError):
    """A prompt that is not answered; the message is one line."""


class Chat:
    """A base model, loaded once, and the adapters that answer in turn.

    An adapter of conversations goes on with one: every speaker knows what was asked before and what
    itself has answered, and the oldest exchanges are left out as in training. Otherwise every
    prompt stands by itself.

    Parameters
    ----------
    request
        Who answers, and how.

    Attributes
    ----------
    template
        The prompt of the adapter's training, with column names in braces; None if it is not known:
        then a prompt is what is typed.

    Raises
    ------
    ValueError
        If the adapter or its base model is not there or does not fit, before the model is loaded
        where that shows.
    """

    def __init__(self, request: ChatRequest) -> None:
        trusted = request.trust_remote_code
        stored = read_adapter(request.folder, trust_remote_code=trusted)
        self.template = _of_training(request.folder, stored, "template")
        self._system_prompt = _of_training(request.folder, stored, "system_prompt")
        self._kind = _of_training(request.folder, stored, "format") or "columns"
        self._adapters = {_title(who): _adapter_of(who, stored) for who in request.speakers}
        self._base = stored.spec.base
        self._codec = answer_codec(self._base, self._prompt("?"))
        model = load_adapter(request.folder, trust_remote_code=trusted).model
        assert isinstance(model, LoraCausalLM)
        self._model = model.to(resolve_device("auto"))
        self._options = GenerationOptions(
            stored.max_length, request.max_new_tokens, temperature=request.temperature
        )
        self._seed = request.seed or 0
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._turns: dict[str, Conversation] = dict.fromkeys(self._adapters, ())

    @property
    def keeps_turns(self) -> bool:
        """Whether a prompt goes on with the conversation before it."""
        return not isinstance(self._prompt("?"), str)

    @property
    def knows_its_prompt(self) -> bool:
        """Whether a prompt is made as those of the training were."""
        return self.template is not None or self._kind != "columns"

    @property
    def speakers(self) -> tuple[str, ...]:
        """Title of each who answers, in order."""
        return tuple(self._adapters)

    def answers(self, typed: str) -> Iterator[tuple[str, str]]:
        """Yield each speaker's title and answer, as soon as it is written.

        All of them draw with one seed, the next prompt with the one after it.

        Raises
        ------
        PromptError
            If the prompt is blank, or too long to leave room for an answer.
        """
        if not typed.strip():
            raise PromptError("the prompt is blank")
        text = typed.encode(errors="replace").decode()  # of bytes that are no text
        prompts = {title: self._asked(title, text) for title in self._adapters}
        tokens = {title: self._tokens(prompt) for title, prompt in prompts.items()}
        seed = self._seed
        self._seed += 1
        for title, adapter in self._adapters.items():
            self._model.load_whole(adapter)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                options = self._options
                (made,) = written_answers(self._model, [tokens[title]], self._codec.end, options)
            answer, prompt = self._codec.decode(made), prompts[title]
            if not isinstance(prompt, str):
                self._turns[title] = [*prompt, {"role": "assistant", "content": answer}]
            yield title, answer

    def _asked(self, title: str, text: str) -> Prompt:
        """Return the prompt of a speaker: with the conversation before it, if there is one."""
        prompt = self._prompt(text)
        before = self._turns[title]
        return prompt if isinstance(prompt, str) or not before else [*before, prompt[-1]]

    def _tokens(self, prompt: Prompt) -> list[int]:
        tokens = prompt_tokens(self._base, prompt, self._options.max_length)
        if not tokens:
            raise PromptError(
                f"the prompt leaves no room for an answer within {self._options.max_length} "
                "tokens, the adapter's dataset.max_length"
            )
        return tokens

    def _prompt(self, text: str) -> Prompt:
        return typed_prompt(
            text, kind=self._kind, template=self.template, system_prompt=self._system_prompt
        )


def _of_training(folder: Path, stored: StoredAdapter, name: str) -> str | None:
    """Return a setting of the data that the adapter's card has, or its run's settings."""
    found = stored.facts.get(name) or read_run(folder).setting("dataset", name)
    return found if isinstance(found, str) else None


def _title(speaker: str | int) -> str:
    return speaker if isinstance(speaker, str) else f"rank {speaker}"


def _adapter_of(speaker: str | int, stored: StoredAdapter) -> Adapter:
    whole = stored.adapter
    if speaker == BASE:
        return whole.map(lambda factors: factors.select(()))
    largest = max((factors.rank for factors in whole.modules.values()), default=0)
    if speaker in (WHOLE, largest):
        return whole
    return truncate_adapter(whole, int(speaker)).adapter
