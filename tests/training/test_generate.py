from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from causal_factories import CAUSAL, TINY_CAUSAL
from training_factories import SPEC, random_adapter

from hafl_app.training import generate
from hafl_app.training.answers import GenerationScores
from hafl_app.training.base_model import hash_word
from hafl_app.training.generate import (
    AnswerCodec,
    GenerationOptions,
    NoAnswerError,
    answers_in_time,
    score_generation,
    written_answers,
)

OPTIONS = GenerationOptions(max_length=20, max_new_tokens=6, batch_size=3, precision="fp32")
NEVER = 511  # no prompt's token, and none that the model ends with


@pytest.fixture(scope="module")
def model():
    """A model whose adapter decides what it writes."""
    made = CAUSAL.build()
    made.load_whole(random_adapter(made, 3, seed=5))
    return made


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 500, length).tolist() for length in lengths]


def slow_answer(model, prompt, end, most):
    """The definition: the most probable token of the whole row so far, again and again."""
    row = list(prompt)
    for _ in range(most):
        ids = torch.tensor([row])
        with torch.no_grad():
            chosen = int(model(ids, torch.ones_like(ids))[0, -1].argmax())
        if chosen == end:
            break
        row.append(chosen)
    return row[len(prompt) :]


class TestWrittenAnswers:
    def test_are_those_of_each_prompt_by_itself(self, model):
        prompts = prompts_of([9, 1, 4, 12, 2, 7, 3])
        expected = [slow_answer(model, prompt, NEVER, 6) for prompt in prompts]

        assert written_answers(model, prompts, NEVER, OPTIONS) == expected
        assert len({tuple(answer) for answer in expected}) > 3  # or nothing is told apart

    def test_stop_at_the_end_token(self, model):
        prompts = prompts_of([5, 8, 3])
        end = slow_answer(model, prompts[1], NEVER, 6)[2]
        expected = [slow_answer(model, prompt, end, 6) for prompt in prompts]

        answers = written_answers(model, prompts, end, OPTIONS)

        assert answers == expected
        assert len(answers[1]) <= 2 < max(map(len, answers))

    def test_without_an_end_token_go_on_to_the_limit(self, model):
        answers = written_answers(model, prompts_of([4, 6]), None, OPTIONS)
        assert [len(answer) for answer in answers] == [6, 6]

    def test_are_drawn_from_the_whole_vocabulary_by_temperature(self, model):
        (prompt,) = prompts_of([5])
        count = 4000
        options = replace(OPTIONS, max_new_tokens=1, batch_size=count, temperature=0.5)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drawn = written_answers(model, [prompt] * count, None, options)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = model(ids, torch.ones_like(ids))[0, -1]
        tokens = torch.tensor(drawn).flatten()
        found = torch.bincount(tokens, minlength=len(logits)) / count

        def distance(temperature):
            return float((found - (logits / temperature).softmax(0)).abs().sum())

        assert distance(0.5) < min(distance(0.4), distance(0.7), distance(1.0))
        assert len(set(tokens.tolist())) > 60  # transformers' own default are the 50 most probable

    def test_end_where_the_models_positions_do(self, model):
        # the built-in model has 128 positions
        answers = written_answers(
            model, prompts_of([125, 128]), NEVER, replace(OPTIONS, batch_size=1)
        )
        assert [len(answer) for answer in answers] == [3, 0]

    def test_are_written_by_the_adapter_that_is_loaded(self, model):
        prompts = prompts_of([6, 9], seed=3)
        before = written_answers(model, prompts, NEVER, OPTIONS)
        other = CAUSAL.build()

        assert written_answers(other, prompts, NEVER, OPTIONS) != before

    def test_a_models_own_wish_to_sample_does_not_count(self, model, monkeypatch):
        prompts = prompts_of([6, 9], seed=4)
        expected = written_answers(model, prompts, NEVER, OPTIONS)
        wishes = model.base.generation_config
        monkeypatch.setattr(wishes, "do_sample", True)
        monkeypatch.setattr(wishes, "repetition_penalty", 5.0)
        assert written_answers(model, prompts, NEVER, OPTIONS) == expected


class Clock:
    """A clock that a batch of answers takes a second of."""

    def __init__(self, monkeypatch):
        self.seconds, self.limits = 0.0, []
        real = generate._continued
        monkeypatch.setattr(generate, "time", self)

        def continued(model, prompts, end, options, limit):
            self.seconds += 1
            self.limits.append(limit)
            return real(model, prompts, end, options, None)

        monkeypatch.setattr(generate, "_continued", continued)

    def monotonic(self):
        return self.seconds


class TestAnswersInTime:
    PROMPTS = prompts_of([9, 1, 4, 12, 2, 7, 3])

    def test_are_all_where_there_is_time(self, model):
        expected = written_answers(model, self.PROMPTS, NEVER, OPTIONS)
        assert answers_in_time(model, self.PROMPTS, NEVER, OPTIONS, 600) == expected

    def test_are_those_of_the_first_batches_that_ended_in_time(self, model, monkeypatch):
        clock = Clock(monkeypatch)
        found = answers_in_time(model, self.PROMPTS, NEVER, OPTIONS, 2.5)
        monkeypatch.undo()
        assert found == written_answers(model, self.PROMPTS[:6], NEVER, OPTIONS)  # batches of 3
        assert clock.limits == [2.5, 1.5, 0.5]  # the third was cut short

    def test_a_batch_is_stopped_while_it_is_written(self, model, monkeypatch):
        standing = SimpleNamespace(monotonic=lambda: 0.0)  # so that its answers count all the same
        monkeypatch.setattr(generate, "time", standing)
        found = answers_in_time(model, self.PROMPTS[:3], NEVER, OPTIONS, 1e-6)
        assert [len(answer) for answer in found] == [1, 1, 1]

    def test_none_is_refused_in_one_line(self, model):
        options = replace(OPTIONS, max_seconds=1e-6)
        with pytest.raises(NoAnswerError, match="no answer was written within 1e-06 seconds"):
            score_generation(model, TINY_CAUSAL, ["one two"], ["x"], options)

    def test_what_was_not_answered_is_counted(self, model, monkeypatch):
        Clock(monkeypatch)
        options = replace(OPTIONS, max_seconds=1.5)
        scores = score_generation(
            model, TINY_CAUSAL, ["a", "far " * 30, *"bcdef"], ["x"] * 7, options
        )
        assert (scores.num_examples, scores.unanswered, scores.left_out) == (3, 3, 1)


class TestScoreGeneration:
    def test_categories_are_those_of_the_rows_that_were_answered(self, model, monkeypatch):
        monkeypatch.setattr(generate, "written_answers", lambda *_: [[1], [2]])
        scores = score_generation(
            *(model, TINY_CAUSAL, ["one", "far " * 30, "two"], ["1", "9", "0"], OPTIONS),
            ["first", "second", "first"],
        )
        assert scores.categories() == {
            "first": {"rouge-l": 0.5, "exact-match": 0.5, "num_examples": 2}
        }

    def test_prompts_without_room_are_left_out_and_counted(self, model, monkeypatch):
        seen = []

        def answers(_, prompts, end, options):
            seen.extend(prompts)
            return [[1, 2], [3]]

        monkeypatch.setattr(generate, "written_answers", answers)
        prompts = ["one two", "far " * 30, "three", "four"]

        scores = score_generation(
            model, TINY_CAUSAL, prompts, ["1 2", "9", "3", "0"], replace(OPTIONS, max_examples=2)
        )

        assert seen == [[hash_word("one"), hash_word("two")], [hash_word("three")]]
        assert scores == GenerationScores(1.0, 1.0, 2, left_out=1)

    def test_decodes_what_it_generates(self, model, monkeypatch):
        tokens = written_answers(model, [[hash_word("one"), hash_word("two")]], NEVER, OPTIONS)[0]
        words = {token: f"word{token}" for token in tokens}
        monkeypatch.setattr(
            generate,
            "answer_codec",
            lambda *_: AnswerCodec(NEVER, lambda ids: " ".join(words[i] for i in ids)),
        )
        reference = " ".join(words[token] for token in tokens)
        scores = score_generation(model, TINY_CAUSAL, ["one two"], [reference], OPTIONS)
        assert (scores.rouge_l, scores.exact_match) == (1.0, 1.0)

    def test_no_prompt_with_room_is_refused(self, model):
        with pytest.raises(ValueError, match="none of 1 prompts leaves room"):
            score_generation(model, TINY_CAUSAL, ["far " * 30], ["x"], OPTIONS)

    def test_a_classifier_is_refused(self):
        with pytest.raises(ValueError, match="causal_lm only"):
            score_generation(SPEC.build(), SPEC.base, ["a"], ["b"], OPTIONS)
