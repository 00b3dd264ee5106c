"""Conversations as tokens: what counts, over several turns, and what a template cannot do."""

from dataclasses import replace

import pytest
from causal_factories import TINY_CAUSAL
from chat_factories import CHATML, FORGETFUL, MARKED, NO_SYSTEM, base_with_chat, talk

from hafl_app.training.base_model import hub_tokenizer
from hafl_app.training.chat_template import ChatTokenizer, chat_tokenizer, fitted
from hafl_app.training.locate import ModelError
from hafl_app.training.prompts import answer_end, load_pair_tokenizer, prompt_tokens
from hafl_app.training.settings import BaseSpec

TWO_TURNS = talk("hi", "hello you", "and now?", "bye ", system="be short")


def counted(base: BaseSpec, messages, chat: ChatTokenizer | None = None) -> list[str]:
    """Return the texts of the tokens that count, a run each."""
    row = (chat or chat_tokenizer(base)).row(messages)
    assert len(row.ids) == len(row.counts)
    runs, current = [], []
    for token, counts in [*zip(row.ids, row.counts, strict=True), (0, False)]:
        if counts:
            current.append(token)
        elif current:
            runs.append(hub_tokenizer(base).decode(current))
            current = []
    return runs


class TestTurns:
    @pytest.mark.parametrize("template", [CHATML, MARKED])
    def test_every_turn_of_the_assistant_counts_up_to_its_end_and_nothing_else(
        self, tmp_path, template
    ):
        base = base_with_chat(tmp_path, template)
        assert counted(base, TWO_TURNS) == ["hello you<|im_end|>", "bye <|im_end|>"]

    @pytest.mark.parametrize("template", [CHATML, MARKED])
    def test_a_turn_of_weight_0_does_not_count(self, tmp_path, template):
        base = base_with_chat(tmp_path, template)
        messages = [*TWO_TURNS]
        messages[2] = {**messages[2], "weight": 0}
        assert counted(base, messages) == ["bye <|im_end|>"]

    @pytest.mark.parametrize("template", [CHATML, MARKED])
    def test_tokens_are_those_of_transformers(self, tmp_path, template):
        base = base_with_chat(tmp_path, template)
        tokenizer, chat = hub_tokenizer(base), chat_tokenizer(base)

        whole = tokenizer.apply_chat_template(TWO_TURNS)["input_ids"]
        prompt = tokenizer.apply_chat_template(TWO_TURNS[:-1], add_generation_prompt=True)

        assert chat.row(TWO_TURNS).ids == whole
        assert chat.prompt(TWO_TURNS[:-1]) == prompt["input_ids"]

    def test_both_kinds_of_templates_count_the_same(self, tmp_path):
        plain = chat_tokenizer(base_with_chat(tmp_path / "plain", CHATML))
        marked = chat_tokenizer(base_with_chat(tmp_path / "marked", MARKED))
        assert plain.row(TWO_TURNS) == marked.row(TWO_TURNS)

    def test_what_is_generated_goes_on_where_the_loss_begins(self, tmp_path):
        chat = chat_tokenizer(base_with_chat(tmp_path, CHATML))
        ids, counts = chat.row(talk("hi", "hello"))
        prompt = chat.prompt(talk("hi"))
        assert ids[: counts.index(True)] == prompt

    def test_a_mark_ends_an_answer_not_the_end_of_a_text(self, tmp_path):
        base = base_with_chat(tmp_path, CHATML)
        tokenizer = hub_tokenizer(base)
        assert answer_end(base, talk("hi")) == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert answer_end(base, "hi") == tokenizer.eos_token_id


class TestRefusals:
    def test_a_model_without_a_template(self, tmp_path):
        with pytest.raises(ModelError, match=r"no chat template; set model\.chat_template"):
            chat_tokenizer(base_with_chat(tmp_path, None))

    def test_a_template_that_writes_earlier_turns_otherwise(self, tmp_path):
        chat = chat_tokenizer(base_with_chat(tmp_path, FORGETFUL))
        assert chat.row(talk("hi", "hello")).counts.count(True) == len("hello") + 1
        with pytest.raises(ModelError, match="otherwise once it goes on"):
            chat.row(TWO_TURNS)

    def test_markers_around_some_turns_alone(self, tmp_path):
        template = MARKED.replace("== 'assistant'", "== 'assistant' and loop.last")
        chat = chat_tokenizer(base_with_chat(tmp_path, template))
        with pytest.raises(ModelError, match="marks other turns"):
            chat.row(TWO_TURNS)

    def test_no_words_of_a_conversation_are_in_the_message(self, tmp_path):
        chat = chat_tokenizer(base_with_chat(tmp_path, NO_SYSTEM + CHATML))
        with pytest.raises(ModelError, match="refuses a conversation of the data") as caught:
            chat.row(TWO_TURNS)
        assert "be short" not in str(caught.value)
        assert caught.value.__cause__ is None

    def test_marks_that_the_tokenizer_lacks(self, tmp_path):
        base = replace(base_with_chat(tmp_path, None, marks=()), chat_template="chatml")
        with pytest.raises(ModelError, match=r"no <\|im_start\|>; expected instruction"):
            chat_tokenizer(base)


class TestNamedTemplates:
    def test_instruction_needs_words_alone(self, tmp_path):
        base = replace(base_with_chat(tmp_path, None, marks=()), chat_template="instruction")
        text = hub_tokenizer(base).decode(chat_tokenizer(base).row(TWO_TURNS).ids)
        assert text == (
            "<s>be short\n\n### Instruction:\nhi\n\n### Response:\nhello you</s>\n\n"
            "### Instruction:\nand now?\n\n### Response:\nbye </s>\n\n"
        )
        assert counted(base, TWO_TURNS) == ["hello you</s>", "bye </s>"]
        chat = chat_tokenizer(base)
        ids, counts = chat.row(talk("hi", "x"))
        assert ids[: counts.index(True)] == chat.prompt(talk("hi"))
        assert chat.end == hub_tokenizer(base).eos_token_id

    def test_chatml_is_chatml(self, tmp_path):
        base = replace(base_with_chat(tmp_path, None), chat_template="chatml")
        other = base_with_chat(tmp_path / "own", CHATML)
        assert chat_tokenizer(base).row(TWO_TURNS) == chat_tokenizer(other).row(TWO_TURNS)

    def test_one_of_the_settings_goes_before_the_models_own(self, tmp_path):
        base = replace(base_with_chat(tmp_path, CHATML), chat_template="{{ 'x' }}" + MARKED)
        assert hub_tokenizer(base).decode(chat_tokenizer(base).row(TWO_TURNS).ids)[0] == "x"


class TestFitting:
    MESSAGES = talk("aa", "b", "ccc", "d", "e", "ffff", system="s")

    def length(self, messages):
        return sum(len(message["content"]) for message in messages)

    @pytest.mark.parametrize(("most", "kept"), [(13, 7), (12, 5), (10, 5), (9, 3), (6, 3), (1, 3)])
    def test_the_oldest_exchanges_go_and_the_system_message_stays(self, most, kept):
        found = [*fitted(self.MESSAGES, self.length, most)]
        assert len(found) == kept
        assert found[0] == self.MESSAGES[0]
        assert found[1:] == self.MESSAGES[len(self.MESSAGES) - kept + 1 :]

    def test_a_single_exchange_stays(self):
        messages = talk("a" * 50, "b")
        assert [*fitted(messages, self.length, 3)] == messages


class TestRows:
    def test_a_long_conversation_keeps_its_last_answer_whole(self, tmp_path):
        base = base_with_chat(tmp_path, CHATML)
        tokenize = load_pair_tokenizer(base, 120)
        short, long = talk("hi", "yes"), talk("q" * 90, "no", "hi", "yes")

        ids, counts, cut = tokenize([short[:-1], long[:-1]], ["yes", "yes"])

        assert cut == [False, True]
        assert ids[0] == ids[1]
        assert counts[0] == counts[1]

    def test_an_exchange_that_is_too_long_is_cut_at_the_end_of_its_answer(self, tmp_path):
        base = base_with_chat(tmp_path, CHATML)
        whole = chat_tokenizer(base).row(talk("hi", "a long answer"))
        tokenize = load_pair_tokenizer(base, len(whole.ids) - 10)

        (ids,), (counts,), cut = tokenize([talk("hi")], ["a long answer"])

        assert (ids, counts) == (whole.ids[:-10], whole.counts[:-10])
        assert any(counts)
        assert cut == [True]

    def test_a_prompt_that_fills_the_row_leaves_nothing_that_counts(self, tmp_path):
        tokenize = load_pair_tokenizer(base_with_chat(tmp_path, CHATML), 20)
        _, (counts,), _ = tokenize([talk("q" * 90)], ["yes"])
        assert not any(counts)

    def test_a_model_without_files_hashes_words(self):
        (ids,), (counts,), _ = load_pair_tokenizer(TINY_CAUSAL, 50)([TWO_TURNS[:-1]], ["bye"])
        prompt = prompt_tokens(TINY_CAUSAL, TWO_TURNS[:-1], 50)
        assert ids[: len(prompt)] == prompt
        assert sum(counts) == 3 + 2  # hello you, bye, and two ends
        assert ids[-1] == answer_end(TINY_CAUSAL, TWO_TURNS)

    def test_a_prompt_makes_room_as_in_training(self, tmp_path):
        base = base_with_chat(tmp_path, CHATML)
        short, long = talk("hi"), talk("q" * 90, "no", "hi")
        assert prompt_tokens(base, long, 60) == prompt_tokens(base, short, 60)
        assert prompt_tokens(base, talk("q" * 90), 60) == []
