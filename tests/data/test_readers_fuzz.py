"""Arbitrary and damaged files: refused in one line, or read without a row lost or joined."""

import bz2
import gzip
import io
import json
import lzma
import re

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hafl_app.data.decoding import FORMATS, OPEN_COMPRESSED
from hafl_app.data.errors import DataError
from hafl_app.data.files import read_table
from hafl_app.data.settings import DatasetSettings
from hafl_app.data.sources import load_text
from hafl_app.data.tables import standardize

COMMON = {"suppress_health_check": list(HealthCheck), "deadline": None}
QUICK = settings(max_examples=300, **COMMON)
SOAK = settings(max_examples=10_000, **COMMON)

COLUMNS = ("text", "label")
IDS = re.compile(r"#[0-9]{3}#")
"""In every text of the valid files once, so that a row that is lost or joined shows."""

TOKENS = [
    b'"', b'""', b"\n", b"\r", b"\r\n", b",", b"\t", b" ", b"\0", b"\xe9", b"\xff\xfe",
    b"\xef\xbb\xbf", b"\\", b"{", b"}", b"[", b"]", b":", b"null", b"NaN", b"1e999", b"\\ud800",
    b'"text"', b'"label": 1', b"\xe2\x80\xa8",
]  # fmt: skip
NUM_ROWS = 17  # few, so that damage often meets the header and quotes each other
ENDINGS = [*FORMATS, *(f"{kind}{packed}" for kind in FORMATS for packed in OPEN_COMPRESSED)]


def rows(count):
    return [{"text": f"say #{i:03}# now", "label": "abc"[i % 3], "n": i * 7} for i in range(count)]


def packed(kind, count=NUM_ROWS):
    """Return a valid file of an ending such as ``.csv.gz``."""
    table = pd.DataFrame(rows(count))
    name = next(known for known in sorted(FORMATS, key=len)[::-1] if kind.startswith(known))
    made = {
        ".csv": lambda: table.to_csv(index=False).encode(),
        ".tsv": lambda: table.to_csv(index=False, sep="\t").encode(),
        ".txt": lambda: "".join(f"{r['label']}\t{r['text']}\n" for r in rows(count)).encode(),
        ".jsonl": lambda: "".join(json.dumps(r) + "\n" for r in rows(count)).encode(),
        ".json": lambda: json.dumps(rows(count), indent=0).encode(),
        ".parquet": lambda: as_parquet(table),
    }[name]()
    press = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return press[kind.removeprefix(name)](made) if kind != name else made


def as_parquet(table):
    out = io.BytesIO()
    table.to_parquet(out)
    return out.getvalue()


VALID = {kind: packed(kind) for kind in ENDINGS}


def damage(draw, data):
    """Flip a bit, cut the end off, insert words, or remove some bytes."""
    mutated = bytearray(data)
    at = draw(st.integers(0, len(mutated)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "insert", "remove", "swap"]))
    if kind == "flip" and at < len(mutated):
        mutated[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del mutated[at:]
    elif kind == "insert":
        words = st.lists(st.sampled_from(TOKENS) | st.binary(max_size=3), min_size=1, max_size=2)
        mutated[at:at] = b"".join(draw(words))
    elif kind == "remove":
        del mutated[at : at + draw(st.sampled_from([1, 4, 40]))]
    else:
        end = at + draw(st.integers(1, 60))
        mutated[at:end] = mutated[at:end][::-1]
    return bytes(mutated)


@st.composite
def damaged_files(draw):
    kind = draw(st.sampled_from(ENDINGS))
    data = VALID[kind]
    for _ in range(draw(st.integers(1, 2))):
        data = damage(draw, data)
    return kind, data


@st.composite
def stray_quotes(draw):
    """Return a csv or tsv file of rows on one line each, with a quote at two places."""
    kind = draw(st.sampled_from([".csv", ".tsv"]))
    separator = b"," if kind == ".csv" else b"\t"
    lines = VALID[kind].splitlines()
    for _ in range(2):
        number = draw(st.integers(1, len(lines) - 1))
        cells = lines[number].split(separator)
        place = draw(st.integers(0, len(cells) - 1))
        cells[place] = draw(st.sampled_from([b'"%s', b'%s"'])) % cells[place]
        lines[number] = separator.join(cells)
    return kind, b"\n".join(lines) + b"\n"


def text_of(kind, data):
    """Return a file's text, read without the readers; empty if that is no text."""
    unpack = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
    for ending, opener in unpack.items():
        if kind.endswith(ending):
            data = opener(data)
    return data.decode("utf-8-sig") if ".parquet" not in kind else ""


def check_file(folder, kind, data):
    """Only a refusal in one line, or every row of the file as one of the table."""
    path = folder / f"data{kind}"
    path.write_bytes(data)
    try:
        table = standardize(read_table(path, COLUMNS, "label"), *COLUMNS, str(path))
    except DataError as error:
        message = str(error).replace(str(path), "")
        assert "\n" not in message
        assert len(message) < 1000
        return
    texts = table["text"].tolist()
    assert not any(re.search(r"#[0-9]{3}#[^#]*[\r\n].*#[0-9]{3}#", text) for text in texts)
    if ".parquet" not in kind:
        # The header counts too: no reader can know that a damaged name was once a row.
        seen = [*table.columns, *table.astype(object).to_numpy().ravel()]
        cells = " ".join(map(str, seen))
        missing = set(IDS.findall(text_of(kind, data))) - set(IDS.findall(cells))
        assert not missing, missing
    assert table["label"].map(lambda label: isinstance(label, str) and label != "").all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


@pytest.mark.parametrize("kind", ENDINGS)
def test_what_is_not_damaged_is_read(folder, kind):
    check_file(folder, kind, VALID[kind])
    path = folder / f"valid{kind}"
    path.write_bytes(VALID[kind])
    if not kind.startswith(".parquet."):
        assert read_table(path, COLUMNS, "label")["text"].tolist() == [
            r["text"] for r in rows(NUM_ROWS)
        ]


class TestDamage:
    @QUICK
    @given(damaged_files())
    def test_is_refused_or_loses_nothing(self, folder, file):
        check_file(folder, *file)

    @pytest.mark.soak
    @pytest.mark.timeout(1800)
    @SOAK
    @given(damaged_files())
    def test_of_ten_thousand_files(self, folder, file):
        check_file(folder, *file)


class TestStrayQuotes:
    @QUICK
    @given(stray_quotes())
    def test_lose_no_row(self, folder, file):
        check_file(folder, *file)

    @pytest.mark.soak
    @pytest.mark.timeout(1800)
    @SOAK
    @given(stray_quotes())
    def test_of_ten_thousand_files(self, folder, file):
        check_file(folder, *file)


arbitrary = st.binary(max_size=200) | st.lists(st.sampled_from(TOKENS), max_size=30).map(b"".join)


def check_load(folder, kind, data):
    """Only a refusal, or a data set of at least two classes."""
    path = folder / f"whole{kind}"
    path.write_bytes(data)
    try:
        loaded = load_text(DatasetSettings("local", path=str(path)))
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert len(loaded.label_names) >= 2


class TestArbitraryBytes:
    @settings(QUICK, max_examples=200)
    @given(st.sampled_from(ENDINGS), arbitrary)
    def test_raise_nothing_else(self, folder, kind, data):
        check_load(folder, kind, data)

    @pytest.mark.soak
    @pytest.mark.timeout(1800)
    @SOAK
    @given(st.sampled_from(ENDINGS), arbitrary)
    def test_of_ten_thousand_files(self, folder, kind, data):
        check_load(folder, kind, data)
