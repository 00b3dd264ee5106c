import errno
import pickle

import node_factories
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto

from hafl_app.client.error_replies import errors_as_replies, fault_behind
from hafl_app.client.node_config import NodeConfigError
from hafl_app.client.permissions import ERROR_DETAILS, NotAllowedError
from hafl_app.config.compose import SettingsError
from hafl_app.data.errors import DataError, UnfitDataError
from hafl_app.engines.in_process import server_identity
from hafl_app.training.locate import ModelError
from hafl_app.training.task import DeviceMemoryError, LossNotFiniteError, TrainingError
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.faults import Fault, error_reply, fault_of


@pytest.fixture
def request_message():
    with server_identity():
        yield Message(RecordDict(), 7, MessageType.TRAIN)


class TestCodes:
    def test_are_none_of_flowers(self):
        flowers = {code for name, code in vars(ErrorCode).items() if name.isupper()}
        assert len(flowers) == 9  # in flwr 1.41.0
        assert not flowers & set(Fault)
        assert min(Fault) > 1000

    def test_keep_their_numbers(self):
        # Nodes and server may run different versions: append, never renumber.
        assert {fault.name: int(fault) for fault in Fault} == {
            "OUT_OF_MEMORY": 1001,
            "LOSS_NOT_FINITE": 1002,
            "DATA_UNAVAILABLE": 1003,
            "MODEL_UNAVAILABLE": 1004,
            "DISK_FULL": 1005,
            "REFUSED": 1006,
            "BAD_REQUEST": 1007,
            "WORKER_FAILED": 1008,
            "UNEXPECTED": 1009,
        }


class TestErrorReply:
    @pytest.mark.parametrize("fault", list(Fault))
    def test_survives_flowers_serializations(self, request_message, fault):
        reply = error_reply(request_message, fault, "rank 64 on cuda")

        for again in (
            reply,
            Message.inflate(reply.deflate()),  # a SuperNode's objects
            message_from_proto(message_to_proto(reply)),
            pickle.loads(pickle.dumps(reply)),  # noqa: S301  # Ray's way from actor to driver
        ):
            assert fault_of(again) is fault
            assert again.error.reason == "rank 64 on cuda"
            assert again.metadata.src_node_id == 7

    def test_the_reason_is_one_short_line(self, request_message):
        reason = error_reply(request_message, Fault.REFUSED, "no\n  such\tmodel " + 999 * "x").error
        assert reason.reason.startswith("no such model xxx")
        assert len(reason.reason) == 300

    def test_nothing_else_is_a_fault(self, request_message):
        content = RecordDict({"fault": ConfigRecord({"code": 1001})})
        assert fault_of(Message(content, reply_to=request_message)) is None
        for code in (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, 0, 1000, 1010, -1001):
            assert fault_of(Message(Error(code, "?"), reply_to=request_message)) is None


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "/home/ada/diary.txt")


class TestFaultBehind:
    @pytest.mark.parametrize(
        ("error", "fault"),
        [
            (DeviceMemoryError("cpu: rank 8"), Fault.OUT_OF_MEMORY),
            (torch.OutOfMemoryError("CUDA out of memory."), Fault.OUT_OF_MEMORY),
            (MemoryError(), Fault.OUT_OF_MEMORY),
            (LossNotFiniteError("the loss is nan"), Fault.LOSS_NOT_FINITE),
            (TrainingError("the plan trains nothing"), Fault.BAD_REQUEST),
            (DataError("no file"), Fault.DATA_UNAVAILABLE),
            (UnfitDataError("2 unknown classes", "HIV"), Fault.DATA_UNAVAILABLE),
            (ModelError("no folder"), Fault.MODEL_UNAVAILABLE),
            (FULL, Fault.DISK_FULL),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), Fault.DISK_FULL),
            (caused(ModelError("cannot be downloaded"), FULL), Fault.DISK_FULL),
            (caused(DataError("?"), caused(RuntimeError("?"), FULL)), Fault.DISK_FULL),
            (NotAllowedError("model not on the list"), Fault.REFUSED),
            (RecordError("no plan"), Fault.BAD_REQUEST),
            (SettingsError("client.batch_size=0"), Fault.BAD_REQUEST),
        ],
        ids=lambda value: value.name if isinstance(value, Fault) else type(value).__name__,
    )
    def test_knows(self, error, fault):
        found = fault_behind(error)
        assert found is not None
        assert found[0] is fault

    @pytest.mark.parametrize(
        "error",
        [KeyError("x"), RuntimeError("x"), ValueError("x"), OSError(errno.EACCES, "x"), OSError()],
    )
    def test_does_not_guess(self, error):
        assert fault_behind(error) is None

    def test_data_and_paths_stay_on_the_node(self):
        told = [
            fault_behind(DataError("train data: label 'HIV positive' in /home/ada/patients.csv")),
            fault_behind(FULL),
        ]
        assert not any("ada" in reason or "HIV" in reason for _, reason in told)

    def test_data_that_do_not_fit_are_told_without_the_details(self):
        error = UnfitDataError("2 unknown classes", "'HIV positive' in /home/ada/patients.csv")

        assert fault_behind(error) == (Fault.DATA_UNAVAILABLE, "2 unknown classes")

    def test_what_the_server_can_mend_is_told_in_full(self):
        assert fault_behind(LossNotFiniteError("the loss is nan in step 3")) == (
            Fault.LOSS_NOT_FINITE,
            "the loss is nan in step 3",
        )
        assert fault_behind(DeviceMemoryError("cpu: rank 8"))[1] == "cpu: rank 8"


class TestAnsweringFaults:
    def answer(self, message, error, config=None):
        @errors_as_replies
        def handler(message, context):
            raise error

        return handler(message, node_factories.context(config))

    def test_on_its_users_own_machine_a_reply_names_files(
        self, request_message, monkeypatch, tmp_path
    ):
        monkeypatch.setenv(ERROR_DETAILS, "true")
        full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
        reasons = {DataError("train.csv, row 3: no label"): "train.csv, row 3: no label"}
        reasons[full] = f"no space left on a disk of this node: {tmp_path}"
        for error, reason in reasons.items():
            assert self.answer(request_message, error).error.reason == reason
            # Not of a file that is the node's own, whatever the environment says.
            own = self.answer(request_message, error, {"data-path": "/home/ada/private.csv"})
            assert reason not in own.error.reason

    def test_a_fault_is_the_reply(self, request_message, caplog):
        reply = self.answer(request_message, DataError("row 3: 'a private text'"))

        assert fault_of(reply) is Fault.DATA_UNAVAILABLE
        assert "private" not in reply.error.reason
        assert "row 3: 'a private text'" in caplog.text  # for the node's owner

    def test_anything_else_is_a_fixed_sentence(self, request_message, caplog):
        reply = self.answer(request_message, ZeroDivisionError("label 'HIV' in /home/ada/x.csv"))

        assert fault_of(reply) is Fault.UNEXPECTED
        assert reply.error.reason == (
            "unexpected ZeroDivisionError on this node; its own log has the traceback"
        )
        assert "label 'HIV'" in caplog.text
        assert "Traceback" in caplog.text

    def test_the_device_is_named_unless_it_is_withheld(self, request_message):
        error = DeviceMemoryError("cuda: NVIDIA L4: rank 1 needs 920 MB, and 810 MB are usable")

        named = self.answer(request_message, error, {"share": "device"})
        hidden = self.answer(request_message, error, {"share": "losses"})

        assert "L4" in named.error.reason
        assert hidden.error.reason == "this node's memory does not suffice"
        assert fault_of(hidden) is Fault.OUT_OF_MEMORY

    def test_a_server_forges_no_line_in_the_nodes_log(self, request_message, caplog):
        self.answer(request_message, SettingsError("x\nINFO all is well\x1b[2J" + "y" * 10**6))

        (line,) = [record.getMessage() for record in caplog.records]
        assert "\n" not in line
        assert "\x1b" not in line
        assert len(line) < 1200

    def test_the_details_are_for_the_nodes_own_log(self, request_message, caplog):
        reply = self.answer(request_message, NodeConfigError("rank", "a number", "/home/ada"))

        assert fault_of(reply) is Fault.BAD_REQUEST
        assert "ada" not in reply.error.reason
        assert "ada" in caplog.text

    def test_an_answer_is_passed_on(self, request_message):
        @errors_as_replies
        def handler(message, context):
            return message, context

        assert handler(request_message, "context") == (request_message, "context")
