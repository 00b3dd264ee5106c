"""A node's own conversations: bounded by the node, and never quoted in what may leave."""

import json

import pytest

from hafl_app.data.conversations import ONE_CLASS
from hafl_app.data.errors import DataError, UnfitDataError
from hafl_app.data.own_conversations import OwnConversations
from hafl_app.data.own_file import OwnFile


def said(role, content):
    return {"role": role, "content": content}


ROWS = [
    {"messages": [said("user", f"secret {i}"), said("assistant", "word " * (1 + i % 3))]}
    for i in range(20)
]


class Tokenizer:
    """A token for every word, so many at most."""

    def __init__(self, most=100):
        self.most = most
        self.asked = []

    def __call__(self, prompts, answers):
        self.asked += prompts
        rows, masks = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            before = sum(len(message["content"].split()) for message in prompt)
            after = len(answer.split())
            rows.append(([1] * before + [2] * after)[: self.most])
            masks.append(([False] * before + [True] * after)[: self.most])
        return rows, masks, [False] * len(rows)


def write(tmp_path, rows, name="own.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def own(path, tokenize=None, *, system_prompt=None, **settings):
    return OwnConversations(
        OwnFile(str(path), **settings),
        system_prompt=system_prompt,
        holdout_fraction=0.25,
        seed=3,
        tokenize_pairs=tokenize or Tokenizer(),
        tokenizer_key="k",
        cache=None,
    )


def test_rows_are_trained_on_or_held_out(tmp_path):
    share = own(write(tmp_path, ROWS)).share()
    assert (share.label_names, share.num_examples) == ((ONE_CLASS,), 15)
    assert (len(share.train()), len(share.holdout())) == (15, 5)
    assert set(share.train().num_targets) == {1, 2, 3}
    pairs = share.holdout_pairs()
    assert len(pairs.prompts) == len(pairs.answers) == len(pairs.categories) == 5


def test_the_runs_categories_are_left_as_they_are(tmp_path):
    assert own(write(tmp_path, ROWS)).share(("qa", "poem")).label_names == ("qa", "poem")


def test_rows_are_drawn_and_get_the_runs_system_message(tmp_path):
    tokenize = Tokenizer()
    made = own(write(tmp_path, ROWS), tokenize, max_examples=8, system_prompt="be kind")
    assert made.share().num_examples == 6
    made.share().train()
    assert [prompt[0]["content"] for prompt in tokenize.asked] == ["be kind"] * 8


@pytest.mark.parametrize(
    ("rows", "format_"),
    [
        ([{"text": "private", "label": "x"}], "chat"),
        ([{**ROWS[0], "prompt": "private", "completion": "x"}], "chat"),
        (ROWS, "prompt_completion"),
    ],
)
def test_other_columns_are_told_without_naming_them(tmp_path, rows, format_):
    with pytest.raises(UnfitDataError, match="no columns of conversations") as caught:
        own(write(tmp_path, rows), format=format_).share()
    assert "private" not in str(caught.value)
    assert "messages" not in str(caught.value)
    assert "messages" in caught.value.details


def test_the_operators_kind_is_read(tmp_path):
    rows = [{**row, "prompt": f"p {i}", "completion": "c"} for i, row in enumerate(ROWS)]
    tokenize = Tokenizer()
    own(write(tmp_path, rows), tokenize, format="prompt_completion").share().train()
    assert {prompt[0]["content"][0] for prompt in tokenize.asked} == {"p"}


def test_a_row_that_is_no_conversation_is_for_the_nodes_own_log(tmp_path):
    rows = [*ROWS, {"messages": [said("user", "secret")]}]
    with pytest.raises(DataError, match="row 21: no assistant's turn") as caught:
        own(write(tmp_path, rows)).share()
    assert not isinstance(caught.value, UnfitDataError)  # so the server reads none of it


def test_rows_without_room_for_an_answer(tmp_path):
    with pytest.raises(UnfitDataError, match="no row of this node keeps a token"):
        own(write(tmp_path, ROWS), Tokenizer(most=2)).share().train()


def test_a_file_larger_than_the_node_allows(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b" " * 1_000_001)
    OwnFile(str(path), max_megabytes=2).version()
    with pytest.raises(UnfitDataError, match="max-data-mb") as caught:
        OwnFile(str(path), max_megabytes=1).version()
    assert str(path) not in str(caught.value)
