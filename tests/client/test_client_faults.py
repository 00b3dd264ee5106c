"""Error replies of the ClientApp: its answers where it cannot do what it is asked."""

import csv
import errno
import os
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType
from running import TINY, records, run_tiny
from transformers import BertConfig, BertModel, BertTokenizerFast

from hafl_app.client import handlers
from hafl_app.client.permissions import ERROR_DETAILS, own_machine
from hafl_app.client_app import app
from hafl_app.engines.in_process import InProcessGrid, server_identity
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.run import build
from hafl_app.training import locate as locate_module
from hafl_app.training.base_model import load_tokenizer
from hafl_app.training.classifier import LoraClassifier
from hafl_app.training.lora_model import adapter_shapes, resident_model
from hafl_app.training.settings import BaseSpec
from hafl_app.training.task import DeviceMemoryError
from hafl_app.wire.faults import Fault, fault_of
from hafl_app.wire.records import AdapterArrays, adapter_content, plan_record

pytestmark = pytest.mark.slow  # whole federations

RANK, NODE = 3, 2  # node 2 has partition 1


def forget() -> None:
    """Drop what a process keeps: a deployed node answers every message in a new one."""
    build._federated_text.cache_clear()
    resident_model.cache_clear()
    load_tokenizer.cache_clear()


class Node:
    """A node of a federation, to be asked directly."""

    def __init__(self, *overrides: str) -> None:
        self.overrides = (*TINY, *overrides)
        self.grid = InProcessGrid(app, 5, {"overrides": shlex.join(self.overrides)})

    def ask(self, kind: str, **changes) -> Message:
        forget()
        with server_identity(), own_machine():
            os.environ.pop(ERROR_DETAILS)  # a node of somebody else's, with all other permissions
            message = Message(self.content(**changes), NODE, kind)
            return next(iter(self.grid.send_and_receive([message])))

    def content(self, poison: float = 1.0, **records: ConfigRecord):
        settings = build.settings_of_run({"overrides": shlex.join(self.overrides)})
        # The layers of the built-in model, whichever the node is told to load.
        spec = build.model_spec(settings, 20)
        shapes = adapter_shapes(replace(spec, base=BaseSpec("", random_weights=True)))
        rng = np.random.default_rng(0)
        modules = {
            name: (
                rng.normal(size=(RANK, shape.in_features)).astype(np.float32),
                rng.normal(size=(shape.out_features, RANK)).astype(np.float32) * poison,
            )
            for name, shape in shapes.items()
        }
        plan = TrainPlan({name: ModulePlan((0, 1, 2), (0, 2)) for name in shapes})
        wanted = {"plan": plan_record(plan), "config": ConfigRecord({"server-round": 1})}
        return adapter_content(AdapterArrays(modules), **(wanted | records))


@pytest.fixture(autouse=True)
def fresh():
    yield
    forget()


@pytest.fixture
def data(tmp_path):
    """Return a folder with labeled text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    with (folder / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows(
            [f"{label} is what number {i} says", label] for i in range(50) for label in "ab"
        )
    return folder


@pytest.fixture
def model(tmp_path):
    """Return a folder with a base model as wide as the built-in one, and its tokenizer."""
    folder = tmp_path / "model"
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    BertModel(config).save_pretrained(folder)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    return folder


def test_a_healthy_node_brings_numbers():
    node = Node()

    assert node.ask(MessageType.QUERY).has_content()
    assert node.ask(MessageType.EVALUATE).has_content()
    reply = node.ask(MessageType.TRAIN)
    assert reply.has_content()
    assert reply.content["metrics"]["micro-batch-size"] == 16


class TestData:
    @pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE, MessageType.QUERY])
    def test_gone_since_the_query(self, data, kind):
        node = Node("dataset=local", f"dataset.path={data}")
        assert node.ask(MessageType.QUERY).has_content()

        shutil.rmtree(data)
        reply = node.ask(kind)

        assert fault_of(reply) is Fault.DATA_UNAVAILABLE
        assert "texts" not in reply.error.reason  # the folder's name is the node's affair

    def test_a_text_that_is_no_text_is_not_told(self, data):
        with (data / "train.csv").open("a") as file:
            file.write('"","a secret label"\n')

        reply = Node("dataset=local", f"dataset.path={data}").ask(MessageType.TRAIN)

        assert fault_of(reply) is Fault.DATA_UNAVAILABLE
        assert "secret" not in reply.error.reason


class TestModel:
    def test_gone_since_the_last_round(self, model):
        node = Node("model=encoder", f"model.path={model}")
        assert node.ask(MessageType.TRAIN).has_content()

        shutil.rmtree(model)

        for kind in (MessageType.TRAIN, MessageType.EVALUATE):
            reply = node.ask(kind)
            assert fault_of(reply) is Fault.MODEL_UNAVAILABLE
            assert reply.error.reason == f"model.path={model}: no such folder"

    @pytest.mark.parametrize(
        ("file", "size"),
        [("model.safetensors", None), ("model.safetensors", 1000), ("config.json", 50)],
    )
    def test_files_that_are_not_whole(self, model, file, size):
        whole = (model / file).read_bytes()
        (model / file).unlink()
        if size is not None:
            (model / file).write_bytes(whole[:size])

        reply = Node("model=encoder", f"model.path={model}").ask(MessageType.TRAIN)

        assert fault_of(reply) is Fault.MODEL_UNAVAILABLE
        assert reply.error.reason.startswith(f"model.path={model}: ")


def test_a_disk_that_is_full_while_the_model_comes(monkeypatch):
    def snapshot_download(*arguments, local_files_only=False, **options):
        if local_files_only:
            raise ValueError("not in the cache")
        raise OSError(errno.ENOSPC, "No space left on device", "/home/ada/.cache")

    monkeypatch.setattr(locate_module, "snapshot_download", snapshot_download)

    reply = Node("model=encoder", "model.path=somebody/encoder").ask(MessageType.TRAIN)

    assert fault_of(reply) is Fault.DISK_FULL
    assert "ada" not in reply.error.reason


class TestLoss:
    def test_poisoned_weights(self):
        reply = Node().ask(MessageType.TRAIN, poison=np.inf)

        assert fault_of(reply) is Fault.LOSS_NOT_FINITE
        assert reply.error.reason == "the loss is nan in step 1, epoch 1"

    def test_a_learning_rate_that_is_far_too_large(self):
        node = Node("client=sgd", "client.learning_rate=1e30", "client.batch_size=4")

        reply = node.ask(MessageType.TRAIN)

        assert fault_of(reply) is Fault.LOSS_NOT_FINITE
        assert "in step 2" in reply.error.reason


class TestMemory:
    def limit(self, monkeypatch, texts):
        forward = LoraClassifier.forward

        def limited(classifier, input_ids, attention_mask):
            if len(input_ids) > texts:
                raise torch.OutOfMemoryError("CUDA out of memory. GPU 0, process 77")
            return forward(classifier, input_ids, attention_mask)

        monkeypatch.setattr(LoraClassifier, "forward", limited)

    def test_that_suffices_for_some_texts_is_enough(self, monkeypatch):
        self.limit(monkeypatch, texts=5)

        reply = Node().ask(MessageType.TRAIN)

        assert reply.has_content()
        assert 1 < reply.content["metrics"]["micro-batch-size"] <= 5

    def test_that_suffices_for_none_is_told_with_the_rank(self, monkeypatch):
        self.limit(monkeypatch, texts=0)

        reply = Node().ask(MessageType.TRAIN)

        assert fault_of(reply) is Fault.OUT_OF_MEMORY
        assert "1 text at a time of a batch of 16, at rank 3, of which 2" in reply.error.reason

    def test_during_evaluation(self, monkeypatch):
        self.limit(monkeypatch, texts=0)

        reply = Node().ask(MessageType.EVALUATE)

        assert fault_of(reply) is Fault.OUT_OF_MEMORY
        assert "77" not in reply.error.reason


class TestRequests:
    @pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
    @pytest.mark.parametrize("text", ["{}", "not a plan", '{"modules": 3, "tail": null}'])
    def test_a_plan_that_is_none(self, kind, text):
        reply = Node().ask(kind, plan=ConfigRecord({"plan": text}))

        assert fault_of(reply) is Fault.BAD_REQUEST
        assert reply.error.reason.startswith("no readable plan in the message")

    def test_settings_that_are_none(self):
        node = Node()
        node.grid = InProcessGrid(app, 5, {"overrides": "client.batch_size=many"})

        reply = node.ask(MessageType.QUERY)

        assert fault_of(reply) is Fault.BAD_REQUEST
        assert "batch_size" in reply.error.reason

    def test_the_text_of_what_nobody_foresaw_stays_here(self, monkeypatch):
        def broken(*arguments, **named):
            raise KeyError("surprise")

        monkeypatch.setattr(handlers, "train_locally", broken)

        reply = Node().ask(MessageType.TRAIN)

        assert fault_of(reply) is Fault.UNEXPECTED
        assert "KeyError" in reply.error.reason
        assert "surprise" not in reply.error.reason


def test_a_run_goes_on_without_the_node_and_names_its_reason(tmp_path, monkeypatch):
    train = handlers.train_locally
    asked = []

    def scarce(classifier, adapter, *arguments, **named):
        asked.append(adapter)
        if len(asked) == 1:
            raise DeviceMemoryError("cuda: out of memory at rank 8")
        return train(classifier, adapter, *arguments, **named)

    monkeypatch.setattr(handlers, "train_locally", scarce)
    run_tiny(tmp_path / "a", "federation.num_rounds=1", "federation.alone_clients_per_rank=0")

    errors = [client["error"] for client in records(tmp_path / "a", "client") if client["error"]]
    assert errors == ["cuda: out of memory at rank 8"]
    assert [r["replies"] for r in records(tmp_path / "a", "round")][1:] == [4]
