import errno
import json
import logging
import math
import os
import pickle
import resource
import stat
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hafl_app.server import checkpoint_store
from hafl_app.server.checkpoint_store import CheckpointError, CheckpointStore

TENSORS = {
    "layer.0/lora_A": torch.arange(6.0).reshape(2, 3),
    "layer.0/lora_B": torch.arange(10.0).reshape(5, 2) - 4,
    "half": torch.tensor([1.5, -0.0, math.inf], dtype=torch.bfloat16),
    "counts": torch.tensor([[2**62 + 1], [-7]]),
    "held": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
}
STATE = {"ledger": [{"bytes": 2**70, "loss": -0.1}, None], "method": "hafl", "done": False}
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32),
    *(torch.uint16, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2),
]


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def content(tensors, state):
    """Everything that must survive; the text tells 1 from True and 1.0, and compares NaN."""
    parts = [(name, t.dtype, t.shape, raw(t)) for name, t in tensors.items()]
    return parts, json.dumps(state)


def read(store):
    checkpoint = store.latest()
    return checkpoint.server_round, content(checkpoint.tensors, checkpoint.state)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path)


@pytest.fixture
def saved(store):
    """Path of a whole checkpoint of round 7."""
    return store.save(7, TENSORS, STATE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = [*shape, dtype.itemsize]
    if dtype == torch.bool:
        return torch.randint(0, 2, size, dtype=torch.uint8, generator=numbers).view(dtype)[..., 0]
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=numbers).view(dtype)[..., 0]


class TestWhatIsSaved:
    def test_odd_tensors_come_back_in_order_and_bit_for_bit(self, store, saved):
        checkpoint = store.latest()

        assert content(checkpoint.tensors, checkpoint.state) == content(TENSORS, STATE)
        assert (checkpoint.server_round, checkpoint.path) == (7, saved)
        assert saved.name == "round-00007.safetensors"

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), tensors(), max_size=4),
        st.dictionaries(st.text(), json_values, max_size=4),
        st.integers(0, 200_000),
    )
    def test_anything_comes_back(self, tmp_path, tensors, state, server_round):
        CheckpointStore(tmp_path / str(server_round)).save(server_round, tensors, state)

        got = read(CheckpointStore(tmp_path / str(server_round)))

        assert got == (server_round, content(tensors, state))

    @pytest.mark.parametrize("name", ["", "state", "tensor/state", "__metadata__", "a\0b", "../x"])
    def test_no_name_of_a_tensor_is_special(self, store, name):
        store.save(1, {name: torch.arange(3)}, {})

        assert list(store.latest().tensors) == [name]

    def test_slices_of_one_tensor_are_saved_apart(self, store):
        whole = torch.arange(15.0, requires_grad=True).reshape(5, 3)
        parts = {"upper": whole[:2], "lower": whole[1:], "turned": whole.T, "same": whole[:2]}

        store.save(1, parts, {})

        got = store.latest().tensors
        assert all(torch.equal(got[name], parts[name]) for name in parts)
        assert not any(tensor.requires_grad for tensor in got.values())

    def test_tensors_are_written_from_where_they_lie(self, store, monkeypatch):
        written = {}
        monkeypatch.setattr(
            checkpoint_store,
            "write_tensors",
            lambda path, tensors, header: (written.update(tensors), path.touch()),
        )

        store.save(1, TENSORS, {})

        pointers = {tensor.data_ptr() for tensor in written.values()}
        assert {tensor.data_ptr() for tensor in TENSORS.values()} <= pointers

    def test_only_its_owner_may_read_it(self, saved):
        assert stat.S_IMODE(saved.stat().st_mode) == 0o600

    def test_tensors_read_may_be_changed(self, store, saved):
        store.latest().tensors["layer.0/lora_A"].add_(1)

        assert read(store) == (7, content(TENSORS, STATE))

    @pytest.mark.parametrize(
        ("tensors", "state", "reason"),
        [
            ({"x": torch.zeros(3, dtype=torch.complex128)}, {}, "complex128"),
            ({"x": torch.zeros(3, device="meta")}, {}, "meta"),
            ({"x": torch.zeros(3, 2).to_sparse()}, {}, "Sparse"),
            ({"x": torch.zeros(3, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, {}, "F8_E8M0"),
            ({"\ud800": torch.zeros(3)}, {}, "surrogates"),
            ({}, {"a": [0, (1, 2)]}, r"state\.a\[1\] is tuple, expected a plain JSON value"),
            ({}, {"a": {3: 1}}, r"state\.a: key 3 is int, expected str"),
            ({}, {"a": torch.zeros(2)}, r"state\.a is Tensor"),
            ({}, {"a": 10**5000}, "4300 digits"),
        ],
    )
    def test_what_would_not_survive_is_refused_before_anything_is_written(
        self, store, saved, tensors, state, reason
    ):
        before = saved.read_bytes()

        with pytest.raises(CheckpointError, match=f"round 7 cannot be a checkpoint: .*{reason}"):
            store.save(7, tensors, state)

        assert saved.read_bytes() == before

    def test_state_nested_too_deep_is_refused(self, store):
        deep = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(CheckpointError, match="recursion"):
            store.save(1, {}, {"a": deep})

    def test_a_negative_round_is_refused(self, store):
        with pytest.raises(CheckpointError, match="at least 0, got -1"):
            store.save(-1, {}, {})


class TestFolder:
    def test_without_checkpoints_there_is_none(self, tmp_path):
        assert CheckpointStore(tmp_path).latest() is None
        assert CheckpointStore(tmp_path / "missing").latest() is None

    def test_the_newest_two_stay(self, store, tmp_path):
        for server_round in (1, 2, 5, 9):
            store.save(server_round, {"w": torch.tensor([float(server_round)])}, {})

        assert names_in(tmp_path) == ["round-00005.safetensors", "round-00009.safetensors"]
        assert store.latest().tensors["w"].item() == 9

    def test_as_many_stay_as_are_asked_for(self, tmp_path):
        store = CheckpointStore(tmp_path, keep=1)
        for server_round in (99_999, 100_000):
            store.save(server_round, {}, {})

        assert names_in(tmp_path) == ["round-100000.safetensors"]
        with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
            CheckpointStore(tmp_path, keep=0)

    def test_rounds_are_ordered_as_numbers(self, store):
        for server_round in (99_999, 100_000):
            store.save(server_round, {}, {})

        assert store.latest().server_round == 100_000

    def test_a_round_saved_again_is_replaced(self, store, tmp_path):
        store.save(3, {"w": torch.zeros(2)}, {"try": 1})
        store.save(3, {"w": torch.ones(5)}, {"try": 2})

        assert read(store) == (3, content({"w": torch.ones(5)}, {"try": 2}))
        assert names_in(tmp_path) == ["round-00003.safetensors"]

    def test_what_was_just_saved_stays_although_later_rounds_are_there(self, store, tmp_path):
        for server_round in (7, 8, 3):
            store.save(server_round, {}, {})

        assert [name[6:11] for name in names_in(tmp_path)] == ["00003", "00007", "00008"]

    def test_other_files_are_left_alone(self, store, tmp_path):
        others = ["metrics.jsonl", "round-7.safetensors", "round-00001.safetensors.bak", "x.tmp"]
        for name in others:
            (tmp_path / name).write_text("mine")
        for server_round in (1, 2, 3):
            store.save(server_round, {}, {})

        assert set(others) < set(names_in(tmp_path))
        assert store.latest().server_round == 3

    def test_a_folder_that_cannot_be_listed_is_no_empty_one(self, store, monkeypatch):
        def refuse(_):
            raise PermissionError(errno.EACCES, "not yours")

        monkeypatch.setattr(Path, "iterdir", refuse)
        with pytest.raises(PermissionError):
            store.latest()


class TestInterrupted:
    """Rounds 6 and 7 are there, and writing round 8 goes wrong."""

    @pytest.fixture(autouse=True)
    def two_checkpoints(self, store, tmp_path):
        store.save(6, {"w": torch.ones(2)}, {})
        store.save(7, TENSORS, STATE)
        self.before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def assert_as_before(self, folder):
        assert {path: path.read_bytes() for path in folder.iterdir()} == self.before

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize("call", ["replace", "fsync"])
    def test_a_step_that_fails_changes_nothing(self, store, tmp_path, monkeypatch, call, error):
        def fail(*_):
            raise error

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            store.save(8, TENSORS, STATE)

        self.assert_as_before(tmp_path)

    def test_a_folder_that_cannot_be_synchronized_costs_no_checkpoint(
        self, store, tmp_path, monkeypatch
    ):
        def fail(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EIO, "bad sector")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="bad sector"):
            store.save(8, TENSORS, STATE)

        assert [name[6:11] for name in names_in(tmp_path)] == ["00006", "00007", "00008"]

    def test_a_disk_that_fills_up_while_writing_changes_nothing(self, store, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                store.save(8, TENSORS, STATE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        self.assert_as_before(tmp_path)

    def test_the_content_is_on_the_disk_before_its_name_is(self, store, tmp_path, monkeypatch):
        steps, fsync, replace = [], os.fsync, os.replace

        def logged_fsync(descriptor):
            status = os.fstat(descriptor)
            steps.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
            fsync(descriptor)

        def logged_replace(source, target):
            steps.append("name")
            replace(source, target)

        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "replace", logged_replace)
        path = store.save(8, TENSORS, STATE)

        assert steps == [path.stat().st_size, "name", "folder"]

    def test_a_killed_write_leaves_a_temporary_that_the_next_save_removes(
        self, store, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(os, "replace", lambda *_: os._exit(9))
        if not (child := os.fork()):
            store.save(8, TENSORS, STATE)
        os.waitpid(child, 0)
        monkeypatch.undo()
        leftover = set(names_in(tmp_path)) - {path.name for path in self.before}

        assert leftover == {".round-00008.safetensors.tmp"}
        assert read(store) == (7, content(TENSORS, STATE))
        store.save(9, {}, {})
        assert names_in(tmp_path) == ["round-00007.safetensors", "round-00009.safetensors"]

    def test_what_an_earlier_version_left_of_a_killed_write_is_removed(self, store, tmp_path):
        (tmp_path / ".round-00008.safetensors.tmp").write_bytes(b"half of it")

        store.save(8, TENSORS, STATE)  # the same round, once more

        assert names_in(tmp_path)[-1] == "round-00008.safetensors"
        assert not any(name.startswith(".") for name in names_in(tmp_path))

    def test_an_old_one_that_cannot_be_removed_does_not_fail_the_save(
        self, store, monkeypatch, caplog
    ):
        def refuse(path, missing_ok=False):
            raise PermissionError(errno.EACCES, "busy")

        monkeypatch.setattr(Path, "unlink", refuse)
        store.save(8, TENSORS, STATE)

        assert store.latest().server_round == 8
        assert "round-00006.safetensors could not be removed" in caplog.text


def edit(path, change):
    """Rewrite a file's header; data and checksum stay."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def swap_names(header):
    first, second = "tensor/layer.0/lora_A", "tensor/layer.0/lora_B"
    header[first], header[second] = header[second], header[first]


def swap_offsets(header):
    header["tensor/one"], header["tensor/two"] = header["tensor/two"], header["tensor/one"]


class MakesAFile:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestDamaged:
    def refused(self, store, reason):
        with pytest.raises(CheckpointError, match=reason) as caught:
            store.latest()
        assert "\n" not in str(caught.value)

    def test_truncated_anywhere_it_is_refused(self, store, saved):
        data = saved.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        borders = {*range(20), *range(header - 10, header + 10), *range(len(data) - 20, len(data))}
        for length in borders | set(range(0, len(data), 13)):
            saved.write_bytes(data[:length])
            self.refused(store, "no whole checkpoint: .*round-00007")

    @pytest.mark.parametrize(
        "change",
        [
            swap_names,
            lambda h: h.update({"tensor/renamed": h.pop("tensor/half")}),
            lambda h: h["tensor/layer.0/lora_A"].update(shape=[3, 2]),
            lambda h: h["tensor/layer.0/lora_A"].update(dtype="I32"),
            lambda h: h["tensor/nothing"].update(shape=[3, 0]),
            lambda h: h["tensor/scalar"].update(shape=[1]),
            lambda h: h["__metadata__"].update(sha256="0" * 64),
            lambda h: h.update({"tensor/more": h["tensor/nothing"]}),
        ],
    )
    def test_a_header_that_was_changed_is_refused(self, store, saved, change):
        edit(saved, change)
        self.refused(store, "damaged: .*SHA-256")

    def test_two_tensors_exchanged_are_noticed(self, store):
        path = store.save(7, {"one": torch.zeros(3), "two": torch.ones(3)}, {})
        edit(path, swap_offsets)
        self.refused(store, "damaged: .*SHA-256")

    def test_another_round_is_noticed(self, store, saved, tmp_path):
        saved.rename(tmp_path / "round-00009.safetensors")
        self.refused(store, "holds round 7, expected 9")
        edit(tmp_path / "round-00009.safetensors", lambda h: h["__metadata__"].update(round="9"))
        self.refused(store, "damaged: .*SHA-256")

    def test_a_newer_format_is_refused_by_name(self, store, saved):
        edit(saved, lambda h: h["__metadata__"].update(version="2"))
        self.refused(store, "written in format version 2, newer than 1")

    @pytest.mark.parametrize("part", ["format", "version", "round", "sha256"])
    def test_a_header_without_one_of_its_facts_is_refused(self, store, saved, part):
        edit(saved, lambda h: h["__metadata__"].pop(part))
        self.refused(store, "not a checkpoint|KeyError")

    def test_a_shape_beyond_any_memory_is_refused(self, store, saved):
        edit(saved, lambda h: h["tensor/nothing"].update(shape=[0, 2**64 - 1]))
        self.refused(store, "TypeError")  # torch's own message has many lines

    @pytest.mark.parametrize("metadata", [None, {}])
    def test_a_header_without_facts_is_refused(self, store, saved, metadata):
        edit(saved, lambda h: h.update(__metadata__=metadata))
        self.refused(store, "not a checkpoint")

    def test_foreign_files_are_refused(self, store, tmp_path):
        save_file({"w": torch.ones(3)}, tmp_path / "round-00001.safetensors")
        (tmp_path / "round-00002.safetensors").write_text("notes\n" * 40)
        (tmp_path / "round-00003.safetensors").write_bytes(b"")
        (tmp_path / "round-00004.safetensors").mkdir()
        (tmp_path / "round-00005.safetensors").symlink_to(tmp_path / "gone")

        self.refused(store, "00005.*regular file; .*00004.*regular file; .*00003.*00002.*00001.*")

    @pytest.mark.parametrize("kind", ["pickle", "torch"])
    def test_a_pickle_is_refused_and_never_executed(self, store, tmp_path, kind):
        path, trap, file = tmp_path / "round-00001.safetensors", tmp_path / "executed", BytesIO()
        (torch.save if kind == "torch" else pickle.dump)(MakesAFile(trap), file)
        path.write_bytes(file.getvalue())

        self.refused(store, "SafetensorError")

        assert not trap.exists()
        file.seek(0)
        torch.load(file, weights_only=False) if kind == "torch" else pickle.load(file)  # noqa: S301
        assert trap.exists()  # so it would have been executed

    def test_an_unreadable_file_is_refused(self, store, saved, monkeypatch):
        def refuse(_):
            raise OSError(errno.EIO, "bad sector")

        monkeypatch.setattr(Path, "read_bytes", refuse)
        self.refused(store, "OSError: .*bad sector")

    def test_the_one_before_is_used_and_the_reason_logged(self, store, saved, caplog):
        newer = store.save(8, {"w": torch.zeros(3)}, {})
        newer.write_bytes(newer.read_bytes()[:-1])

        with caplog.at_level(logging.WARNING, "hafl_app.server.checkpoint_store"):
            assert read(store) == (7, content(TENSORS, STATE))

        assert len(caplog.records) == 1
        assert "round-00008.safetensors: SafetensorError" in caplog.text


@st.composite
def damages(draw, data):
    """Any few edits: bits flipped, bytes overwritten, removed, inserted or repeated."""
    mutated = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(mutated)))
        end = min(len(mutated), start + draw(st.sampled_from([1, 2, 8, 64])))
        kind = draw(st.sampled_from(["flip", "overwrite", "remove", "insert", "repeat", "digits"]))
        if kind == "flip" and start < len(mutated):
            mutated[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "overwrite":
            mutated[start:end] = draw(st.binary(max_size=64))
        elif kind == "remove":
            del mutated[start:end]
        elif kind == "insert":
            mutated[start:start] = draw(st.binary(max_size=8))
        elif kind == "repeat":
            mutated[start:start] = mutated[start:end]
        else:  # stays JSON, with other numbers in it
            old, new = draw(st.lists(st.integers(0, 99), min_size=2, max_size=2))
            mutated = mutated.replace(b"%d" % old, b"%d" % new)
    return bytes(mutated)


OLDER = {"w": torch.arange(4.0)}, {"round": 7}


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """Rounds 7 and 8, with the path and the bytes of round 8."""
    store = CheckpointStore(tmp_path_factory.mktemp("fuzzed"))
    store.save(7, *OLDER)
    path = store.save(8, TENSORS, STATE)
    return store, path, path.read_bytes()


class TestFuzzed:
    """Whatever happens to round 8: exactly its content or exactly that of round 7."""

    def check(self, store, path, mutated):
        path.write_bytes(mutated)
        assert read(store) in ((7, content(*OLDER)), (8, content(TENSORS, STATE)))

    @settings(max_examples=300)
    @given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def test_a_flipped_bit_is_never_read_as_something_else(self, fallback, position, bit):
        store, path, data = fallback
        mutated = bytearray(data)
        mutated[int(position * len(data))] ^= 1 << bit
        self.check(store, path, mutated)

    @settings(max_examples=300)
    @given(st.data())
    def test_damage_is_never_read_as_something_else(self, fallback, edits):
        store, path, data = fallback
        self.check(store, path, edits.draw(damages(data)))

    @pytest.mark.soak
    def test_every_single_bit_flipped_is_never_read_as_something_else(self, fallback):
        store, path, data = fallback
        for position in range(len(data)):
            for bit in range(8):
                mutated = bytearray(data)
                mutated[position] ^= 1 << bit
                self.check(store, path, mutated)

    @pytest.mark.soak
    @settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_ten_thousand_damages_are_never_read_as_something_else(self, fallback, edits):
        store, path, data = fallback
        self.check(store, path, edits.draw(damages(data)))
