"""Who answers a prompt of `hafl chat`, with what, and who is refused before a model is loaded."""

import json

import pytest
import torch
from causal_factories import CAUSAL
from training_factories import SPEC, random_adapter

from hafl_app.experiments import chat as chat_module
from hafl_app.experiments.chat import Chat, PromptError
from hafl_app.experiments.chat_request import read_request
from hafl_app.publishing.export import ExportRequest, export_adapter
from hafl_app.publishing.truncation import truncate_adapter
from hafl_app.training.adapter_files import read_adapter, save_adapter
from hafl_app.training.generate import GenerationOptions, answer_codec, written_answers
from hafl_app.training.prompts import prompt_tokens

RANK = 3


def save(folder, **facts):
    adapter = random_adapter(CAUSAL.build(), RANK, seed=5)
    save_adapter(folder, adapter, CAUSAL, label_names=(), max_length=16, facts=facts)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture
def prompts(monkeypatch):
    """Prompts as they go to the tokenizer."""
    found = []
    real = chat_module.prompt_tokens

    def noted(spec, prompt, max_length):
        found.append(prompt)
        return real(spec, prompt, max_length)

    monkeypatch.setattr(chat_module, "prompt_tokens", noted)
    return found


def talk(folder, compare=None, **how):
    return Chat(read_request(folder, compare, **{"max_new_tokens": 8, **how}))


def written(prompt, adapter):
    """What a model of its own writes, which holds this adapter or none."""
    model = CAUSAL.build()
    if adapter is not None:
        model.load_whole(adapter)
    tokens = prompt_tokens(CAUSAL.base, prompt, 16)
    codec = answer_codec(CAUSAL.base)
    options = GenerationOptions(max_length=16, max_new_tokens=8)
    return codec.decode(written_answers(model, [tokens], codec.end, options)[0])


class TestSpeakers:
    def test_each_answers_as_a_model_of_its_own_would(self, folder):
        whole = read_adapter(folder).adapter
        chat = talk(folder, "2,base,adapter,1")
        for prompt in ("what is this", "and that"):  # the second finds the last speaker's factors
            expected = {
                "rank 2": written(prompt, truncate_adapter(whole, 2).adapter),
                "base": written(prompt, None),
                "adapter": written(prompt, whole),
                "rank 1": written(prompt, truncate_adapter(whole, 1).adapter),
            }
            assert len(set(expected.values())) == 4
            assert list(chat.answers(prompt)) == list(expected.items())

    def test_without_a_comparison_it_is_the_whole_adapter(self, folder):
        (largest,) = talk(folder, "3").answers("what is this")
        (alone,) = talk(folder).answers("what is this")
        assert (alone[0], largest[0]) == ("adapter", "rank 3")
        assert alone[1] == largest[1]

    def test_the_base_model_is_loaded_once(self, folder, monkeypatch):
        built = []
        real = type(CAUSAL).build
        monkeypatch.setattr(type(CAUSAL), "build", lambda s: built.append(s) or real(s))
        chat = talk(folder, "base,1,2,3")
        assert len([*chat.answers("one"), *chat.answers("two")]) == 8
        assert len(built) == 1

    def test_an_answer_is_bounded(self, folder):
        ((_, answer),) = talk(folder, max_new_tokens=3).answers("what is this")
        assert len(answer.split()) <= 3


class TestPrompts:
    def test_what_is_typed_fills_the_first_column(self, tmp_path, prompts):
        template = "ask {question}\n\nwith {context}\n\nsay"
        list(talk(save(tmp_path / "a", template=template)).answers("why {context}?"))
        assert prompts == ["ask why {context}?\n\nsay"]

    def test_an_older_card_leaves_the_template_to_the_run(self, tmp_path, prompts):
        (tmp_path / "config.yaml").write_text('dataset: {template: "of the run {x}"}\n')
        list(talk(save(tmp_path / "adapter").parent).answers("typed"))
        list(talk(save(tmp_path / "adapter", template="own {x}").parent).answers("typed"))
        assert prompts == ["of the run typed", "own typed"]

    def test_an_export_keeps_it_and_answers_as_its_rank_did(self, tmp_path, prompts):
        run = save(tmp_path / "adapter", template="own {x}").parent
        export_adapter(ExportRequest(run, tmp_path / "out", ranks=[2]))
        ((_, expected),) = talk(run, "2").answers("typed")
        ((_, answer),) = talk(tmp_path / "out" / "rank-2").answers("typed")
        assert answer == expected
        assert prompts == ["own typed", "own typed"]

    def test_an_adapter_of_conversations_is_talked_to(self, tmp_path, prompts):
        facts = {"format": "messages", "system_prompt": "be kind", "template": None}
        chat = talk(save(tmp_path / "adapter", **facts))
        list(chat.answers("typed"))
        (prompt,) = prompts
        assert [(m["role"], m["content"]) for m in prompt] == [
            ("system", "be kind"),
            ("user", "typed"),
        ]
        assert chat.knows_its_prompt

    def test_each_speaker_goes_on_with_its_own_conversation(self, tmp_path, prompts):
        facts = {"format": "messages", "system_prompt": "be kind", "template": None}
        chat = talk(save(tmp_path / "adapter", **facts), "base,adapter", max_new_tokens=2)
        first = dict(chat.answers("one"))
        prompts.clear()
        list(chat.answers("two"))

        assert chat.keeps_turns
        assert first["base"] != first["adapter"]
        for prompt, title in zip(prompts, ("base", "adapter"), strict=True):
            assert [(m["role"], m["content"]) for m in prompt] == [
                ("system", "be kind"),
                ("user", "one"),
                ("assistant", first[title]),
                ("user", "two"),
            ]

    def test_a_new_conversation_knows_nothing_of_the_one_before(self, tmp_path):
        chat = talk(save(tmp_path / "adapter", format="messages"), max_new_tokens=2)
        first = list(chat.answers("one"))
        assert list(chat.answers("one")) != first
        chat.reset()
        assert list(chat.answers("one")) == first

    def test_a_long_conversation_forgets_its_oldest_exchanges(self, tmp_path):
        chat = talk(save(tmp_path / "adapter", format="messages"), max_new_tokens=2)
        for number in range(9):  # 16 tokens have room for one of them
            assert list(chat.answers(f"the question number {number}"))

    def test_prompts_by_a_template_stand_by_themselves(self, folder):
        chat = talk(folder)
        assert not chat.keeps_turns
        assert list(chat.answers("one")) == list(chat.answers("one"))

    def test_where_none_is_known_it_goes_as_it_is(self, folder, prompts):
        chat = talk(folder)
        list(chat.answers("just\udcff this"))
        assert chat.template is None
        assert not chat.knows_its_prompt
        assert prompts == ["just? this"]

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [("  \n", "the prompt is blank"), ("word " * 16, "no room for an answer within 16 tokens")],
    )
    def test_some_are_not_answered(self, folder, prompt, message):
        chat = talk(folder)
        with pytest.raises(PromptError, match=message):
            list(chat.answers(prompt))
        assert list(chat.answers("word " * 15))


class TestDrawing:
    def test_a_seed_gives_the_same_answers_and_the_next_prompt_others(self, folder):
        def answers(seed):
            chat = talk(folder, "adapter,3", temperature=1.0, seed=seed)
            return [[text for _, text in chat.answers("the same")] for _ in range(2)]

        state = torch.get_rng_state()
        first = answers(7)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)
        assert answers(7) == first
        assert answers(8)[0] == first[1] != first[0]
        assert first[0][0] == first[0][1]  # the same adapter, with the same draws


class TestRefusals:
    @pytest.mark.parametrize(
        ("compare", "how", "message"),
        [
            ("base,4", {}, "--compare base,4: rank 4: expected 1 to 3"),
            ("0", {}, "rank 0: expected 1 to 3"),
            ("bas", {}, "'bas': expected base, adapter or a rank from 1 to 3; did you mean"),
            ("base,", {}, "'': expected base, adapter or a rank"),
            ("-1", {}, "'-1': expected"),
            ("2,base,02", {}, "02 is there twice"),
            (None, {"temperature": -1.0}, "--temperature -1.0: expected 0, or 0.01 to 10"),
            (None, {"temperature": float("nan")}, "--temperature nan"),
            (None, {"seed": 3}, "--seed 3: of drawn answers, add --temperature"),
        ],
    )
    def test_options(self, folder, compare, how, message):
        with pytest.raises(ValueError, match=message) as caught:
            read_request(folder, compare, **how)
        assert "\n" not in str(caught.value)

    def test_a_classifier(self, tmp_path):
        adapter = random_adapter(SPEC.build(), RANK)
        labels = tuple(map(str, range(SPEC.num_labels)))
        save_adapter(tmp_path / "adapter", adapter, SPEC, label_names=labels, max_length=16)
        with pytest.raises(ValueError, match=r"task is classification; expected causal_lm"):
            read_request(tmp_path, None)

    @pytest.mark.parametrize("card", ["[]", "{}", '{"base": 3}', '{"base": {}, "ranks": [1]}'])
    def test_a_damaged_card(self, tmp_path, card):
        (tmp_path / "hafl.json").write_text(card)
        with pytest.raises(ValueError, match="not a saved adapter"):
            read_request(tmp_path, None)

    def test_an_old_card_without_ranks_is_checked_before_the_model_is_loaded(
        self, tmp_path, monkeypatch
    ):
        file = save(tmp_path / "adapter") / "hafl.json"
        card = json.loads(file.read_text())
        del card["ranks"]
        file.write_text(json.dumps(card))
        monkeypatch.setattr(chat_module, "load_adapter", lambda *_, **__: pytest.fail("loaded"))
        with pytest.raises(ValueError, match="rank 4: expected 1 to 3"):
            Chat(read_request(tmp_path, "4"))
