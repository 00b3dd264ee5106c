import mmap
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hafl_app.data.errors import DataError
from hafl_app.data.text import encode

TEXTS = ["one two three", "", "four", "two four"]
LABELS = [2, 0, 1, 2]


class Tokenizer:
    """Character codes; counts how often it is called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, texts):
        self.calls += 1
        return [[ord(letter) for letter in text] for text in texts]


def plain(encoded):
    rows = [encoded.row(i).tolist() for i in range(len(encoded))]
    return rows, encoded.labels.tolist()


EXPECTED = ([[ord(letter) for letter in text] for text in TEXTS], LABELS)
rows_of_text = st.lists(st.tuples(st.text(max_size=6), st.integers(0, 9)), max_size=12)


class TestEncodedText:
    def test_layout(self):
        encoded = encode(TEXTS, LABELS, Tokenizer(), None, "k")

        assert plain(encoded) == EXPECTED
        assert encoded.lengths.tolist() == [13, 0, 4, 8]
        assert encoded.offsets.tolist() == [0, 13, 13, 17, 25]
        assert [a.dtype for a in (encoded.tokens, encoded.offsets, encoded.labels)] == [
            np.int32,
            np.int64,
            np.int64,
        ]

    @given(rows=rows_of_text, data=st.data())
    @settings(max_examples=100, deadline=None)
    def test_select_is_selecting_rows(self, rows, data):
        texts, labels = [text for text, _ in rows], [label for _, label in rows]
        encoded = encode(texts, labels, Tokenizer(), None, "k")
        index = st.integers(0, max(0, len(rows) - 1))
        indices = data.draw(st.lists(index, max_size=15 if rows else 0))

        selected = encoded.select(indices)

        tokens, classes = plain(encoded)
        assert plain(selected) == ([tokens[i] for i in indices], [classes[i] for i in indices])
        assert len(selected.tokens) == sum(len(tokens[i]) for i in indices)

    @pytest.mark.parametrize("index", [-1, 4])
    def test_out_of_range(self, index):
        encoded = encode(TEXTS, LABELS, Tokenizer(), None, "k")

        with pytest.raises(IndexError, match="expected 0 to 3"):
            encoded.row(index)
        with pytest.raises(IndexError, match="expected 0 to 3"):
            encoded.select([0, index])


class TestCache:
    def test_second_time_does_not_tokenize(self, tmp_path):
        first, second = Tokenizer(), Tokenizer()
        encode(TEXTS, LABELS, first, tmp_path / "new" / "folder", "k")

        cached = encode(TEXTS, LABELS, second, tmp_path / "new" / "folder", "k")

        assert (first.calls, second.calls) == (1, 0)
        assert plain(cached) == EXPECTED
        assert len(list(tmp_path.rglob("*.*"))) == 1  # no unfinished file left

    def test_processes_share_the_tokens_instead_of_copying_them(self, tmp_path):
        written = encode(TEXTS, LABELS, Tokenizer(), tmp_path, "k")
        cached = encode(TEXTS, LABELS, Tokenizer(), tmp_path, "k")

        for encoded in (written, cached):
            assert is_mapped(encoded.tokens)
            assert not encoded.tokens.flags.writeable
            assert encoded.select([3, 0]).tokens.flags.writeable

    def test_no_tokens_at_all(self, tmp_path):
        for _ in range(2):
            assert plain(encode(["", ""], [1, 0], Tokenizer(), tmp_path, "k")) == ([[], []], [1, 0])

    def test_what_is_read_outlives_its_file(self, tmp_path):
        encoded = encode(TEXTS, LABELS, Tokenizer(), tmp_path, "k")
        (path,) = tmp_path.glob("*.*")
        path.unlink()
        encode(TEXTS, LABELS, Tokenizer(), tmp_path, "k")

        assert plain(encoded) == EXPECTED

    @pytest.mark.parametrize(
        ("texts", "labels", "key"),
        [
            (TEXTS, LABELS, "other"),
            (TEXTS, [2, 0, 1, 1], "k"),
            (["one two threef", "", "our", "two four"], LABELS, "k"),
            (["one two thre", "e", "four", "two four"], LABELS, "k"),
        ],
    )
    def test_any_difference_is_another_file(self, tmp_path, texts, labels, key):
        encode(TEXTS, LABELS, Tokenizer(), tmp_path, "k")
        again = Tokenizer()

        encoded = encode(texts, labels, again, tmp_path, key)

        assert again.calls == 1
        assert encoded.labels.tolist() == labels
        assert len(list(tmp_path.glob("*.*"))) == 2

    @pytest.mark.parametrize(
        "damage", ["truncated", "empty", "pickle", "shorter", "relabeled", "flipped", "compressed"]
    )
    def test_damaged_file_is_replaced(self, tmp_path, damage):
        encode(TEXTS, LABELS, Tokenizer(), tmp_path, "k")
        (path,) = tmp_path.glob("*.*")
        harm(path, damage)
        again, then = Tokenizer(), Tokenizer()

        encoded = encode(TEXTS, LABELS, again, tmp_path, "k")
        encode(TEXTS, LABELS, then, tmp_path, "k")

        assert plain(encoded) == EXPECTED
        assert (again.calls, then.calls) == (1, 0)

    def test_a_changed_token_at_the_end_of_a_large_file_is_noticed(self, tmp_path):
        texts = ["word " * 40] * 2000  # more than what is read along with the header
        encode(texts, [1] * 2000, Tokenizer(), tmp_path, "k")
        (path,) = tmp_path.glob("*.*")
        content, tokens = path.read_bytes(), np.load(path)["tokens"].tobytes()
        last = content.index(tokens) + len(tokens) - 4
        path.write_bytes(content[:last] + b"\1" + content[last + 1 :])
        again = Tokenizer()

        encoded = encode(texts, [1] * 2000, again, tmp_path, "k")

        assert again.calls == 1
        assert encoded.row(1999).tolist() == [ord(letter) for letter in texts[0]]

    def test_unwritable_cache_only_costs_time(self, tmp_path, caplog):
        (tmp_path / "file").write_text("in the way")

        encoded = encode(TEXTS, LABELS, Tokenizer(), tmp_path / "file" / "folder", "k")

        assert plain(encoded) == EXPECTED
        assert "cannot cache tokens" in caplog.text

    def test_interrupted_write_leaves_nothing(self, tmp_path, monkeypatch):
        def run_out_of_space(file, **_):
            file.write(b"half of it")
            raise OSError("no space left")

        monkeypatch.setattr(np, "savez", run_out_of_space)

        assert plain(encode(TEXTS, LABELS, Tokenizer(), tmp_path, "k")) == EXPECTED
        assert not list(tmp_path.glob("*.*"))

    def test_several_processes_at_once(self, tmp_path):
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=encode_often, args=(tmp_path,)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)

        assert [worker.exitcode for worker in workers] == [0] * 4
        assert len(list(tmp_path.glob("*.*"))) == 1


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array's numbers lie in a file that is mapped into memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def harm(path: Path, damage: str) -> None:
    content = path.read_bytes()
    arrays = dict(np.load(path))
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        np.savez(path, **(arrays | {"tokens": np.array([{"a": 1}], dtype=object)}))
    elif damage == "shorter":
        np.savez(path, **(arrays | {"tokens": arrays["tokens"][:-1]}))
    elif damage == "relabeled":
        np.savez(path, **(arrays | {"labels": arrays["labels"][::-1]}))
    elif damage == "compressed":
        np.savez_compressed(path, **arrays)
    else:
        at = content.index(arrays["tokens"].tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def encode_often(cache: Path) -> None:
    for _ in range(20):
        assert plain(encode(TEXTS, LABELS, Tokenizer(), cache, "k")) == EXPECTED
        for path in cache.glob("*.npz"):
            path.unlink(missing_ok=True)
    encode(TEXTS, LABELS, Tokenizer(), cache, "k")


def test_refusals():
    with pytest.raises(DataError, match=r"labels of shape \(3,\) for 4 texts"):
        encode(TEXTS, LABELS[:3], Tokenizer(), None, "k")
    with pytest.raises(DataError, match="made 1 rows of 4 texts"):
        encode(TEXTS, LABELS, lambda _: [[1]], None, "k")
