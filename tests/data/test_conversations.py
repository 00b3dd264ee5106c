"""Conversations from tables: which columns they are in, what is learned, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest

from hafl_app.data.combinations import check_choices
from hafl_app.data.conversations import with_conversations
from hafl_app.data.errors import DataError
from hafl_app.data.federated import FederatedText
from hafl_app.data.partition import Partitioning
from hafl_app.data.settings import DatasetSettings, PartitionSettings
from hafl_app.data.sources import load_text
from hafl_app.data.tables import NOTES


def said(role, content, **more):
    return {"role": role, "content": content, **more}


TALK = [said("system", "be short"), said("user", "hi"), said("assistant", "hello")]
ASKED = [said("user", "which color?")]


def made(rows, kind="chat", label_column="", **how):
    return with_conversations(pd.DataFrame(rows), kind, label_column, "file", **how)


def plain(prompt):
    """Return role and content of messages, and a star at those that are learned."""
    return [f"{m['role']}: {m['content']}{'*' * m['weight']}" for m in prompt]


def only(rows, *args, **how):
    """Return prompt and answer of the first row."""
    table = made(rows, *args, **how)
    return plain(table["text"].iloc[0]), table["answer"].iloc[0]


class TestKinds:
    def test_messages(self):
        prompt, answer = only([{"messages": TALK}])
        assert (prompt, answer) == (["system: be short", "user: hi"], "hello")

    def test_earlier_turns_are_learned_and_what_follows_the_last_is_left_out(self):
        more = [*TALK, said("user", "and?"), said("assistant", "yes"), said("user", "bye")]
        prompt, answer = only([{"messages": more}])
        assert prompt == ["system: be short", "user: hi", "assistant: hello*", "user: and?"]
        assert answer == "yes"

    def test_a_weight_of_0_is_kept_as_openai_has_it(self):
        more = [*TALK, said("user", "and?"), said("assistant", "yes", weight=1)]
        more[2] = {**more[2], "weight": 0}
        assert only([{"messages": more}])[0][2] == "assistant: hello"
        more[4] = {**more[4], "weight": 0}
        more[2] = {**more[2], "weight": 1}
        assert only([{"messages": more}]) == (["system: be short", "user: hi"], "hello")

    def test_sharegpt(self):
        talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
        assert only([{"conversations": talk}]) == (["user: hi"], "hello")

    def test_parts_of_text_are_joined(self):
        parts = [{"type": "text", "text": "which "}, {"type": "text", "text": "color?"}]
        talk = [said("user", parts), said("assistant", "red")]
        assert only([{"messages": talk}]) == (["user: which color?"], "red")

    def test_prompt_and_completion_as_text(self):
        assert only([{"prompt": "a", "completion": "b"}]) == (["user: a"], "b")

    def test_of_a_conversational_prompt_no_turn_is_learned(self):
        row = {"prompt": [*TALK, *ASKED], "completion": [said("assistant", "red")]}
        prompt, answer = only([row])
        assert prompt == [
            "system: be short", "user: hi", "assistant: hello", "user: which color?",
        ]  # fmt: skip
        assert answer == "red"

    @pytest.mark.parametrize(("more", "output"), [("input", "output"), ("context", "response")])
    def test_instructions(self, more, output):
        rows = [
            {"instruction": "add", more: "1 2", output: "3", "system": None},
            {"instruction": "add", more: "", output: "0", "system": "be short"},
        ]
        table = made(rows)
        assert [plain(prompt) for prompt in table["text"]] == [
            ["user: add\n\n1 2"],
            ["system: be short", "user: add"],
        ]
        assert table["answer"].tolist() == ["3", "0"]
        assert table.attrs[NOTES] == (
            f"conversations: instruction, by the columns instruction, {output}, {more}, system",
        )

    def test_a_template_makes_the_users_message(self):
        rows = [{"question": "2+2", "reply": "4"}]
        how = {"template": "Add: {question}", "answer_column": "reply"}
        assert only(rows, **how) == (["user: Add: 2+2"], "4")

    def test_a_system_prompt_is_for_rows_without_one(self):
        rows = [{"messages": TALK}, {"messages": TALK[1:]}]
        table = made(rows, system_prompt="be kind")
        assert [plain(prompt)[0] for prompt in table["text"]] == [
            "system: be short",
            "system: be kind",
        ]

    def test_other_columns_and_categories_stay(self):
        table = made([{"messages": TALK, "owner": 3, "topic": "x"}], label_column="topic")
        assert set(table.columns) == {"text", "answer", "label", "owner", "topic"}
        assert made([{"messages": TALK}])["label"].tolist() == ["all"]

    def test_parquets_arrays(self):
        row = {"messages": np.array([{**m, "weight": None} for m in TALK[1:]], dtype=object)}
        assert only([row]) == (["user: hi"], "hello")


class TestRefusals:
    def test_two_kinds_in_a_file(self):
        rows = [{"messages": TALK, "prompt": "a", "completion": "b"}]
        expected = r"dataset\.format=messages or prompt_completion"
        with pytest.raises(DataError, match=expected):
            made(rows)
        assert only(rows, "prompt_completion") == (["user: a"], "b")

    def test_no_kind_names_what_is_near(self):
        with pytest.raises(DataError, match=r"no such columns, only mesages.*did you mean 'messa"):
            made([{"mesages": TALK}])

    def test_two_answers(self):
        with pytest.raises(DataError, match="no such columns"):
            made([{"instruction": "a", "output": "b", "response": "c"}])

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            (TALK[:2], "no assistant's turn"),
            ([said("assistant", "hello")], "no assistant's turn"),
            ([said("user", "a"), said("assistant", "b", weight=0)], "no assistant's turn"),
            ([said("user", "a"), said("assistant", " ")], "last answer is blank"),
            ([said("user", "a"), said("assistant", None)], "without text"),
            ([said("user", "a"), said("robot", "b")], "a role that is not known"),
            ([said("user", "a"), said("assistant", "b", weight=2)], "a weight"),
            ([said("user", "a"), said("assistant", "b", tool_calls=[{}])], "tool_calls"),
            ([said("user", "a"), said("system", "x"), said("assistant", "b")], "behind others"),
            (["user: a", "assistant: b"], "no object"),
            ("user: a", "no list of messages"),
            ([], "no list of messages"),
            ([said("user", "\ud800"), said("assistant", "b")], "surrogate"),
        ],
    )
    def test_a_row_that_is_no_conversation_is_named(self, messages, reason):
        rows = [{"messages": TALK}, {"messages": messages}, {"messages": messages}]
        with pytest.raises(DataError, match=rf"file, row 2 \(and 1 more\): .*{reason}"):
            made(rows)

    def test_a_system_column_beside_a_system_message(self):
        row = {"prompt": TALK[:2], "completion": [said("assistant", "b")], "system": "x"}
        with pytest.raises(DataError, match="a system column beside"):
            made([row])


class TestChoices:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"source": "synthetic", "format": "chat"}, "has no conversations"),
            ({"format": "messages", "template": "{a}", "answer_column": "b"}, "columns of its own"),
            ({"format": "chat", "template": "{a}"}, "needs the other"),
            ({"format": "chat", "template": "{b}", "answer_column": "b"}, "the answer column"),
            ({"system_prompt": "be kind"}, "no system message"),
            (
                {"source": "on_device", "format": "chat", "template": "{a}", "answer_column": "b"},
                "no column of a node's file",
            ),
        ],
    )
    def test_settings_that_do_not_go_together(self, changes, reason):
        with pytest.raises(DataError, match=reason):
            check_choices(DatasetSettings(**{"source": "local", **changes}))


def words(prompts, answers):
    """Tokenize: a message is a token, and so is the answer."""
    rows = [[1] * len(prompt) + [2] for prompt in prompts]
    return rows, [[False] * (len(row) - 1) + [True] for row in rows], [False] * len(rows)


class TestFiles:
    ROWS = (
        *(
            {"messages": [said("user", f"q {i}"), said("assistant", "a")], "n": i}
            for i in range(29)
        ),
        {"messages": [*TALK, said("user", "q"), said("assistant", "b")], "n": 29},
    )

    @pytest.fixture(params=["jsonl", "json", "parquet"])
    def file(self, request, tmp_path):
        path = tmp_path / f"my.{request.param}"
        if request.param == "jsonl":
            path.write_text("\n".join(map(json.dumps, self.ROWS)))
        elif request.param == "json":
            path.write_text(json.dumps(self.ROWS))
        else:
            pd.DataFrame(self.ROWS).to_parquet(path)
        return path

    def test_the_formats_that_hold_messages(self, file):
        source = DatasetSettings("local", path=str(file), format="chat", label_column="")
        text = load_text(source)
        assert (len(text.train), len(text.test)) == (27, 3)
        rows = [*text.train, *text.test]
        longest = max(rows, key=lambda row: len(row["text"]))
        assert plain(longest["text"]) == [
            "system: be short", "user: hi", "assistant: hello*", "user: q",
        ]  # fmt: skip
        assert sorted(row["n"] for row in rows) == list(range(30))

    def test_clients_get_conversations(self, file):
        data = FederatedText(
            DatasetSettings("local", path=str(file), format="messages", label_column=""),
            Partitioning(PartitionSettings(), 3, 0),
            tokenize=lambda texts: [[0] for _ in texts],
            tokenizer_key="k",
            cache=None,
            tokenize_pairs=words,
        )
        trained = [data.train(i) for i in range(3)]
        assert sum(map(len, trained)) + sum(len(data.holdout(i)) for i in range(3)) == 24
        assert all((rows.num_targets == 1).all() for rows in trained)
        account = data.account()
        assert "conversations: messages, by the columns messages" in account.notes

    def test_a_csv_file_has_prompts_and_completions_as_they_are_written(self, tmp_path):
        path = tmp_path / "my.csv"
        path.write_text("prompt,completion\n" + "".join(f"{i},{i + 1}\n" for i in range(20)))
        text = load_text(DatasetSettings("local", path=str(path), format="chat", label_column=""))
        row = text.train[0]
        assert int(row["answer"]) == int(row["text"][0]["content"]) + 1

    def test_a_hub_set_is_read_by_its_columns(self, monkeypatch):
        asked = []
        rows = [{"prompt": f"{i}", "completion": "x"} for i in range(20)]

        def table(name, revision):
            asked.append((name, revision))
            return pd.DataFrame(rows), None

        monkeypatch.setattr("hafl_app.data.sources.read_hub_table", table)
        source = DatasetSettings(
            "local", hub="owner/name", revision="abc", format="chat", label_column=""
        )
        assert len(load_text(source).train) == 18
        assert asked == [("owner/name", "abc")]
