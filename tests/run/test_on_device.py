"""Federations whose data stay on the nodes: each has a file of its own."""

import json
import shlex
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from running import LONE, TINY, records

from hafl_app.client import handlers
from hafl_app.client.own_data import own_file, own_share
from hafl_app.client.permissions import own_machine
from hafl_app.client_app import app
from hafl_app.config.compose import compose
from hafl_app.data.errors import DataError
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.plan import TrainPlan
from hafl_app.run import build, setup
from hafl_app.run.federation import run
from hafl_app.run.preflight import check
from hafl_app.run.resumable_run import ResumeError
from hafl_app.training.adapter_files import load_adapter
from hafl_app.wire.faults import Fault, fault_of
from hafl_app.wire.node_profile import PROFILE
from hafl_app.wire.records import (
    CONFIG,
    LABEL_NAMES,
    PARTITION_ID,
    PLAN,
    SERVER_ROUND,
    AdapterArrays,
    adapter_content,
    message_bytes,
    plan_record,
)

whole_runs = pytest.mark.slow
WORDS = {"weather": "rain cloud storm", "music": "song drum choir", "food": "bread soup apple"}
ON_DEVICE = (
    *(o for o in TINY if not o.startswith("dataset")),
    "dataset=on_device",
    "dataset.max_length=16",
    "federation.num_clients=3",
    "federation.start_timeout_s=0.5",
)


def rows_of(*labels, number):
    """Return texts about each label in turn, in as many rows."""
    names = [labels[i % len(labels)] for i in range(number)]
    return [{"text": f"{i} {WORDS[name]}", "label": name} for i, name in enumerate(names)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def nodes(tmp_path):
    """Three nodes with 12, 21 and 9 texts; no two have the same classes."""
    return [
        {"rank": 2, "data-path": write(tmp_path / "a.jsonl", rows_of("music", "food", number=12))},
        {"rank": 4, "data-path": write(tmp_path / "b.jsonl", rows_of(*WORDS, number=21))},
        {"rank": 8, "data-path": write(tmp_path / "c.jsonl", rows_of("food", number=9))},
    ]


class RecordingGrid(InProcessGrid):
    """Keeps every message that was sent."""

    def push_messages(self, messages):
        self.sent = [*getattr(self, "sent", []), *(messages := list(messages))]
        return super().push_messages(messages)


def run_on(nodes, folder, *overrides):
    """Run a federation of these nodes; return its summary and the grid."""
    overrides = (*ON_DEVICE, *overrides, f"output_dir={folder}")
    run_config = {"overrides": shlex.join(overrides)}
    grid = RecordingGrid(app, len(nodes), run_config, nodes)
    with server_identity():
        run(grid, build.settings_of_run(run_config), overrides=overrides)
    return json.loads((folder / "summary.json").read_text()), grid


def training_requests(grid):
    return [m for m in getattr(grid, "sent", []) if m.metadata.message_type == MessageType.TRAIN]


@whole_runs
class TestAWholeRun:
    @pytest.fixture
    def finished(self, nodes, tmp_path):
        Path(nodes[0]["data-path"]).write_text("{ broken")
        folder = tmp_path / "out"
        return folder, *run_on(nodes, folder)

    def test_goes_on_without_the_node_whose_file_is_broken(self, finished):
        folder, summary, _ = finished

        assert summary["status"] == "finished"
        assert list(summary["left_out"]) == ["1"]
        assert "its own log says why" in summary["left_out"]["1"]
        assert {c["partition_id"] for c in records(folder, "client")} == {0, 1}
        assert [r["replies"] for r in records(folder, "round")] == [0, 2, 2]

    def test_all_scores_come_from_the_nodes(self, finished):
        folder, summary, _ = finished
        scores = [r["metrics"] for r in records(folder, "round")]

        assert scores[0] == {}  # no node is asked before the first round
        assert all({name.partition("/")[0] for name in s} == {"clients"} for s in scores[1:])
        assert "best_validation" not in summary
        best = max(scores[1:], key=lambda s: (s["clients/macro-f1"], -s["clients/loss"]))
        entry = summary["best_clients"]
        assert entry.items() >= best.items()
        assert (entry["chosen_by"], entry["rows"]) == ("macro-f1", 3)  # 2 of 21 rows, and 1 of 9
        assert summary["device_ranks"] == []
        assert (folder / "adapter-best" / "hafl.json").exists()
        assert (folder / "curves.png").exists()

    def test_the_saved_adapter_has_the_classes_of_the_nodes_that_took_part(self, finished):
        folder, _, _ = finished

        loaded = load_adapter(folder / "adapter")

        assert loaded.label_names == ("food", "music", "weather")
        assert loaded.model.head_state()["weight"].shape[0] == 3

    def test_every_request_has_the_nodes_number_and_the_classes(self, finished):
        _, _, grid = finished

        configs = {
            (m.metadata.dst_node_id, config[PARTITION_ID], tuple(config[LABEL_NAMES]))
            for m in training_requests(grid)
            for config in [m.content[CONFIG]]
        }

        classes = ("food", "music", "weather")
        assert configs == {(2, 0, classes), (3, 1, classes)}

    def test_the_bytes_of_all_that_are_counted(self, finished):
        folder, summary, grid = finished
        counted = [c["bytes_down"] for c in records(folder, "client")]

        assert counted == [message_bytes(m) for m in training_requests(grid)]
        assert summary["bytes"]["train"]["down"] == sum(counted)


@whole_runs
def test_under_privacy_no_round_is_chosen_by_scores_without_noise(nodes, tmp_path):
    folder = tmp_path / "out"

    summary, _ = run_on(
        nodes,
        folder,
        *("privacy=central_dp", "strategy=zero_padding", "federation.fraction_evaluate=1"),
    )

    assert "clients/accuracy" in summary["final"]
    assert not [name for name in summary if name.startswith("best")]
    assert (folder / "adapter").exists()
    assert not (folder / "adapter-best").exists()


@whole_runs
def test_console_and_folder_tell_what_the_clients_scored(nodes, tmp_path, capsys):
    run_on(nodes, tmp_path / "out")

    told = capsys.readouterr().out
    assert "round 2/2  clients " in told
    assert "best clients" in told
    assert "validation" not in told


@whole_runs
class TestSeeds:
    def seeds(self, nodes, folder, monkeypatch):
        seen = []
        train = handlers.train_locally
        monkeypatch.setattr(
            handlers,
            "train_locally",
            lambda *args, **named: seen.append(args[-1]) or train(*args, **named),
        )
        run_on(nodes, folder, "federation.num_rounds=1", "federation.fraction_evaluate=0")
        monkeypatch.undo()
        return seen

    def test_they_follow_the_numbers(self, nodes, tmp_path, monkeypatch):
        numbered = [
            {**node, "partition-id": i, "num-partitions": 3} for i, node in enumerate(nodes)
        ]

        chosen_here = self.seeds(nodes, tmp_path / "a", monkeypatch)
        known_there = self.seeds(numbered, tmp_path / "b", monkeypatch)

        assert len(set(chosen_here)) == 3
        assert chosen_here == known_there


@whole_runs
class TestClasses:
    def test_a_node_outside_of_the_agreed_classes_is_refused(self, nodes, tmp_path, caplog):
        summary, grid = run_on(
            nodes,
            tmp_path / "out",
            "dataset.label_names=[music,food,other]",
            "federation.num_rounds=1",
        )

        # Not by name: under a wrong label-column a label is somebody's text.
        assert summary["left_out"] == {
            "2": "dataset.label_names: labels of this node are not among the 3 of the run; its own "
            "log names them"
        }
        assert "unknown: 'weather'" in caplog.text  # in the node's own log
        assert load_adapter(tmp_path / "out" / "adapter").label_names == ("music", "food", "other")
        assert {m.metadata.dst_node_id for m in training_requests(grid)} == {1, 3}

    def test_a_node_with_other_columns_is_refused_unless_it_names_them(self, nodes, tmp_path):
        rows = [{"body": r["text"], "topic": r["label"]} for r in rows_of("music", number=7)]
        nodes[0]["data-path"] = write(tmp_path / "other.jsonl", rows)
        nodes[2] = nodes[0] | {"text-column": "body", "label-column": "topic"}

        summary, grid = run_on(nodes, tmp_path / "out", "federation.num_rounds=1")

        assert list(summary["left_out"]) == ["1"]
        assert "this node's file has no text column" in summary["left_out"]["1"]
        assert {m.metadata.dst_node_id for m in training_requests(grid)} == {2, 3}

    def test_a_node_that_overflows_the_classes_is_left_out(self, nodes, tmp_path, caplog):
        many = [{"text": f"{i} rain", "label": f"kind {i % 9_998}"} for i in range(29_994)]
        nodes[0]["data-path"] = write(tmp_path / "many.jsonl", many)
        nodes[0]["max-labels"] = 10_000

        summary, grid = run_on(nodes, tmp_path / "out", "federation.num_rounds=1")

        assert "its 9998 classes and those of the other nodes are 10001" in caplog.text
        # Asked again under the classes of the run, it leaves itself out.
        assert "labels of this node are not among the 3 of the run" in summary["left_out"]["1"]
        assert {m.metadata.dst_node_id for m in training_requests(grid)} == {2, 3}
        assert load_adapter(tmp_path / "out" / "adapter").label_names == (
            "food",
            "music",
            "weather",
        )

    def test_one_class_in_all_is_no_classification(self, nodes, tmp_path):
        with pytest.raises(DataError, match=r"dataset\.label_names=null.*: 1 label names"):
            run_on(nodes[2:], tmp_path / "out", "federation.num_clients=1")

        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["status"] == "failed"

    def test_a_late_node_is_held_to_what_was_agreed(self, nodes, tmp_path, monkeypatch):
        monkeypatch.setattr(
            RecordingGrid,
            "get_node_ids",
            lambda grid: [1, 3] if not training_requests(grid) else [1, 2, 3],
        )

        summary, grid = run_on(nodes, tmp_path / "out", "federation.num_clients=2")

        assert "are not among the 2 of the run" in summary["left_out"]["2"]
        # The first query asks for the classes, the later ones say them.
        queries = [m for m in grid.sent if m.metadata.message_type == MessageType.QUERY]
        assert [CONFIG in m.content for m in queries][:3] == [False, False, True]
        assert load_adapter(tmp_path / "out" / "adapter").label_names == ("food", "music")


@whole_runs
class TestAServerWithATestFile:
    def test_scores_and_compares_on_it(self, nodes, tmp_path):
        test = write(tmp_path / "test.jsonl", rows_of(*WORDS, number=10))

        summary, _ = run_on(nodes, tmp_path / "out", LONE, f"dataset.test_path={test}")

        assert "test/accuracy" in summary["final"]
        assert [row["rank"] for row in summary["device_ranks"]] == [2, 4, 8]
        assert "best_clients" in summary  # the test set chooses nothing

    def test_its_classes_count(self, nodes, tmp_path):
        test = write(tmp_path / "test.jsonl", rows_of("weather", number=5))

        run_on(nodes[::2], tmp_path / "out", f"dataset.test_path={test}")

        loaded = load_adapter(tmp_path / "out" / "adapter")
        assert loaded.label_names == ("food", "music", "weather")


@whole_runs
class TestOtherDataSets:
    def test_a_nodes_own_file_goes_before_the_runs_data(self, nodes, tmp_path):
        mixed = [{"partition-id": i, "num-partitions": 2} for i in range(2)] + nodes[:1]
        data = write(tmp_path / "train.jsonl", rows_of(*WORDS, number=40))
        overrides = ("dataset=local", f"dataset.path={data}", "federation.num_rounds=1")

        with own_machine():
            run_on(mixed, tmp_path / "out", *overrides)

        examples = {
            c["partition_id"]: c["num_examples"] for c in records(tmp_path / "out", "client")
        }
        # 12 rows, one held out; it comes after the partitions.
        assert examples[2] == 11
        assert set(examples) == {0, 1, 2}

    def test_such_a_node_needs_no_permission_for_what_it_does_not_read(self, nodes, tmp_path):
        mixed = [{**nodes[1], "allowed-paths": ""}, {**nodes[0], "allowed-paths": ""}]
        data = write(tmp_path / "train.jsonl", rows_of(*WORDS, number=40))

        summary, _ = run_on(
            mixed,
            tmp_path / "out",
            "dataset=local",
            f"dataset.path={data}",
            "federation.num_clients=2",
            "federation.num_rounds=1",
        )

        assert summary["left_out"] == {}


@whole_runs
class TestResuming:
    def test_numbers_and_classes_are_those_of_the_run(self, nodes, tmp_path, monkeypatch):
        folder = tmp_path / "out"
        write(Path(nodes[1]["data-path"]), rows_of("weather", "food", number=21))
        run_on(nodes, folder, "federation.num_rounds=1")
        # Node 1 is gone: the others must not move up, and the class that it alone had stays.
        monkeypatch.setattr(RecordingGrid, "get_node_ids", lambda grid: [2, 3])

        _, grid = run_on(nodes, folder, f"resume={folder}")

        configs = {
            (m.metadata.dst_node_id, m.content[CONFIG][PARTITION_ID])
            for m in training_requests(grid)
        }
        assert configs == {(2, 1), (3, 2)}
        assert load_adapter(folder / "adapter").label_names == ("food", "music", "weather")

    def test_a_resumed_run_ends_like_one_that_was_never_stopped(self, nodes, tmp_path):
        run_on(nodes, tmp_path / "whole")
        run_on(nodes, tmp_path / "parts", "federation.num_rounds=1")
        run_on(nodes, tmp_path / "parts", f"resume={tmp_path / 'parts'}")

        whole, parts = (
            (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
            for name in ("whole", "parts")
        )
        assert whole == parts

    def test_another_order_of_the_data_sets_classes_is_refused(self, nodes, tmp_path):
        folder = tmp_path / "out"
        overrides = ("dataset=local", f"dataset.path={tmp_path / 'train.jsonl'}")
        write(tmp_path / "train.jsonl", rows_of(*WORDS, number=40))
        run_on(nodes[:1], folder, *overrides, "federation.num_rounds=1")
        write(tmp_path / "train.jsonl", rows_of("food", "music", number=40))
        build._federated_text.cache_clear()

        with pytest.raises(ResumeError, match="the data have 2 classes, the run to resume has 3"):
            run_on(nodes[:1], folder, *overrides, f"resume={folder}")


TALKS = (
    *ON_DEVICE,
    *("model=tiny_random_causal", "dataset.format=chat", "dataset.max_length=40"),
    *("client.local_epochs=3", "client.learning_rate=1e-2", "federation.test_every=1"),
)


def talks(path, number, completion=False):
    """Write a node's conversations; each answer follows from its question."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"SECRET {i} {name}"},
                {"role": "assistant", "content": WORDS[name]},
            ]
        }
        for i, name in enumerate([*WORDS][i % 3] for i in range(number))
    ]
    if completion:
        rows = [{"prompt": a["content"], "completion": b["content"]} for a, b in map(_turns, rows)]
    return write(path, rows)


def _turns(row):
    return row["messages"]


@pytest.fixture
def talking(tmp_path):
    """Three nodes with conversations in two formats."""
    return [
        {"rank": 2, "data-path": talks(tmp_path / "a.jsonl", 12)},
        {"rank": 4, "data-path": talks(tmp_path / "b.jsonl", 21, completion=True)},
        {"rank": 8, "data-path": talks(tmp_path / "c.jsonl", 9), "max-length": 8},
    ]


@whole_runs
def test_causal_models_learn_the_nodes_own_conversations(talking, tmp_path, capsys, caplog):
    folder = tmp_path / "out"
    test = talks(tmp_path / "test.jsonl", 15)

    summary, grid = run_on(talking, folder, *TALKS[len(ON_DEVICE) :], f"dataset.test_path={test}")

    scores = [r["metrics"] for r in records(folder, "round")]
    assert scores[-1]["test/perplexity"] < 0.9 * scores[0]["test/perplexity"]
    assert scores[-1]["clients/perplexity"] < scores[1]["clients/perplexity"]
    first = [c for c in records(folder, "client") if c["server_round"] == 1]
    assert sorted(c["num_examples"] for c in first) == [8, 11, 19]
    assert summary["status"] == "finished"
    # The server read its own test file; of what the nodes have nothing is printed or sent.
    told = capsys.readouterr().out + caplog.text
    assert "SECRET" not in told
    assert "A training row" not in told
    assert not any("SECRET" in str(message.content) for message in grid.sent)


class TestAnswers:
    """The answer of a node that is asked directly."""

    def ask(self, node, kind=MessageType.QUERY, content=None, overrides=()):
        run_config = {"overrides": shlex.join([*ON_DEVICE, *overrides])}
        with server_identity():
            grid = InProcessGrid(app, 1, run_config, [node])
            return next(iter(grid.send_and_receive([Message(content or RecordDict(), 1, kind)])))

    def test_the_classes_are_told_only_if_asked_for(self, nodes):
        asked = self.ask(nodes[0])
        told = self.ask(
            nodes[0],
            content=RecordDict({CONFIG: ConfigRecord({LABEL_NAMES: ["food", "music", "x"]})}),
        )

        assert asked.content[PROFILE]["label-names"] == ["food", "music"]
        assert told.content[PROFILE]["label-names"] == []
        assert {"partition-id", "num-partitions"} & set(asked.content[PROFILE]) == set()
        assert asked.content[PROFILE]["num-examples"] == 11

    @pytest.mark.parametrize(
        ("node", "words"),
        [
            ({"partition-id": 0, "num-partitions": 1}, "this node has no data, data-path in its"),
            ({"data-path": "a.jsonl"}, "needs rank in its --node-config"),
        ],
    )
    def test_a_node_that_is_not_set_up_says_what_is_missing(self, nodes, node, words):
        if "data-path" in node:
            node = {"data-path": nodes[0]["data-path"]}

        reply = self.ask(node)

        assert fault_of(reply) is Fault.BAD_REQUEST
        assert words in reply.error.reason

    @pytest.mark.parametrize("column", ["text", "note", "absent"])
    def test_a_run_asks_no_column_out(self, nodes, tmp_path, column):
        rows = [{**row, "note": f"private note {i // 2}"} for i, row in enumerate(self.rows())]
        nodes[0]["data-path"] = write(tmp_path / "notes.jsonl", rows)
        asks = (f"dataset.label_column={column}", "dataset.text_column=label")

        silent = self.ask(nodes[0], overrides=asks)
        decided = self.ask(
            nodes[0] | {"label-column": "label", "text-column": "text"}, overrides=asks
        )

        assert fault_of(silent) is Fault.REFUSED
        assert "a run names no column of this node's file" in silent.error.reason
        assert decided.content[PROFILE]["label-names"] == ["food", "music"]

    def test_conversations_are_counted_and_have_no_classes_to_tell(self, talking):
        reply = self.ask(talking[0], overrides=TALKS[len(ON_DEVICE) :])
        assert reply.content[PROFILE]["num-examples"] == 11
        assert reply.content[PROFILE]["label-names"] == ["all"]

    @pytest.mark.parametrize(("limit", "longest"), [({}, 10), ({"max-length": 8}, 8)])
    def test_the_shorter_limit_cuts_rows(self, talking, limit, longest):
        settings = compose(TALKS)
        file = own_file(settings, {"data-path": talking[0]["data-path"], **limit})
        share = own_share(settings, file, None)
        assert share.train().lengths.max() == longest

    @pytest.mark.parametrize(
        ("node", "fault", "words"),
        [
            ({"data-format": "messages"}, None, ""),
            ({"data-format": "instruction"}, Fault.DATA_UNAVAILABLE, "no columns of conversations"),
            ({"data-format": "columns"}, Fault.BAD_REQUEST, "data-format in this node's"),
            ({"max-length": 0}, Fault.BAD_REQUEST, "max-length in this node's"),
            ({"max-data-mb": "much"}, Fault.BAD_REQUEST, "max-data-mb in this node's"),
        ],
    )
    def test_what_its_operator_says_of_conversations(self, talking, node, fault, words):
        reply = self.ask(talking[0] | node, overrides=TALKS[len(ON_DEVICE) :])
        assert (fault_of(reply) if reply.has_error() else None) is fault
        assert not words or words in reply.error.reason

    def test_a_wrong_column_of_the_operators_is_held_back(self, nodes, tmp_path):
        rows = [{**row, "note": f"private note {i}"} for i, row in enumerate(self.rows())]
        nodes[0]["data-path"] = write(tmp_path / "notes.jsonl", rows)

        reply = self.ask(nodes[0] | {"label-column": "note"})

        assert fault_of(reply) is Fault.DATA_UNAVAILABLE
        assert "24 labels in 24 rows" in reply.error.reason
        assert "private" not in reply.error.reason

    def test_withheld_classes_are_not_asked_out_by_any_message(self, nodes):
        node = nodes[0] | {"share": "scores,importance"}
        content = adapter_content(
            AdapterArrays({}),
            **{
                PLAN: plan_record(TrainPlan({})),
                CONFIG: ConfigRecord({SERVER_ROUND: 1, PARTITION_ID: 0}),
            },
        )

        asked = self.ask(node)
        trained = self.ask(node, MessageType.TRAIN, content)
        told = self.ask(
            node, content=RecordDict({CONFIG: ConfigRecord({LABEL_NAMES: ["food", "music"]})})
        )

        for reply in (asked, trained):
            assert fault_of(reply) is Fault.REFUSED
            assert "dataset.label_names=null needs the labels of this node" in reply.error.reason
        assert told.content[PROFILE]["label-names"] == []

    @staticmethod
    def rows():
        return rows_of("music", "food", number=24)

    def test_a_missing_file_is_not_named_to_the_server(self, tmp_path):
        reply = self.ask({"rank": 2, "data-path": str(tmp_path / "secret.jsonl")})

        assert fault_of(reply) is Fault.DATA_UNAVAILABLE
        assert "secret" not in reply.error.reason

    def test_a_training_request_without_the_nodes_number_is_refused(self, nodes):
        config = ConfigRecord({SERVER_ROUND: 1})
        content = adapter_content(
            AdapterArrays({}), **{PLAN: plan_record(TrainPlan({})), CONFIG: config}
        )

        reply = self.ask(nodes[0], MessageType.TRAIN, content)

        assert fault_of(reply) is Fault.BAD_REQUEST
        assert "'partition-id' is None" in reply.error.reason

    def test_a_replaced_file_is_read_again_by_a_process_that_lives_on(self, nodes):
        before = self.ask(nodes[0]).content[PROFILE]["num-examples"]
        write(Path(nodes[0]["data-path"]), rows_of("music", "food", number=30))

        assert (before, self.ask(nodes[0]).content[PROFILE]["num-examples"]) == (11, 27)


class TestSettings:
    def test_label_names_are_a_list(self):
        settings = compose(["dataset=on_device", "dataset.label_names=[b,a]"])

        assert setup.known_label_names(settings) == ("b", "a")
        assert setup.known_label_names(compose(["dataset=on_device"])) is None

    def test_bad_label_names_are_refused(self):
        with pytest.raises(DataError, match=r"dataset\.label_names: label names are repeated"):
            setup.known_label_names(compose(["dataset=on_device", "dataset.label_names=[a,a]"]))

    def test_a_simulation_has_no_such_nodes(self):
        with pytest.raises(DataError, match="simulated nodes have none"):
            check(compose([*ON_DEVICE]))
