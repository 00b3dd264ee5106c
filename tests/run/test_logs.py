"""Whatever is logged, printed or written holds no row of the data and no key."""

import json
import logging
import traceback

import pytest
from running import TINY

from hafl_app.engines.in_process import run_federation

pytestmark = pytest.mark.slow

WORD = "quagmire"  # in every text, and nowhere else
KEY = "0123456789abcdef" * 2 + "5ec2e75a"
LABELS = ("first", "second", "third")
QUICK = (*TINY, "federation.num_clients=3", "federation.num_rounds=1", "dataset=local")


def rows(count):
    return [
        {"text": f"{WORD}{i} and {WORD}{i * i}", "label": LABELS[i % 3], "note": i}
        for i in range(count)
    ]


def write(path, lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def told(capfd, caplog, monkeypatch):
    """Return a function for all that was printed and logged so far, with every detail asked for."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", f"hf_{KEY}")
    caplog.set_level(logging.DEBUG)

    def text():
        printed = capfd.readouterr()
        logged = "\n".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records)
        return "\n".join([printed.out, printed.err, logged])

    return text


def written(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "tracking", [("tracking=jsonl",), ("tracking=wandb", "tracking.mode=offline")]
)
def test_a_run_tells_neither_rows_nor_keys(tracking, tmp_path, told, caplog):
    data = write(tmp_path / "reviews.jsonl", rows(80))
    folder = tmp_path / "out"

    run_federation([*QUICK, *tracking, f"dataset.path={data}", f"output_dir={folder}"])

    text, files = told(), written(folder)
    assert "round 1/1" in text  # the run did tell something
    assert caplog.records
    names = {path.relative_to(folder).as_posix() for path in files}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "adapter/hafl.json"} <= names
    assert LABELS[0] in (folder / "adapter" / "hafl.json").read_text()  # as it must be
    for secret in (WORD, KEY):
        assert secret not in text
        assert not [path for path, content in files.items() if secret.encode() in content]


def _broken_json(path):
    write(path, rows(40))
    path.write_text(path.read_text() + f'{{"text": "{WORD}99", "label": \n')


def _null_text(path):
    write(path, [*rows(40), {"text": None, "label": WORD, "note": 1}])


def _numeric_text(path):
    write(path, [*rows(40), {"text": 5, "label": f"{WORD}99", "note": 1}])


def _too_many_fields(path):
    lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows(40)), f"{WORD},a,b,c"]
    path.write_text("\n".join(lines))


def _wrong_encoding(path):
    path.write_bytes(f"text,label\n{WORD} caf\u00e9,first\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("data.jsonl", _broken_json),
        ("data.jsonl", _null_text),
        ("data.jsonl", _numeric_text),
        ("data.csv", _too_many_fields),
        ("data.csv", _wrong_encoding),
    ],
)
def test_a_complaint_about_the_data_quotes_no_row(name, spoil, tmp_path, told):
    data, folder = tmp_path / name, tmp_path / "out"
    spoil(data)

    with pytest.raises(ValueError, match=name) as caught:
        run_federation([*QUICK, f"dataset.path={data}", f"output_dir={folder}"])

    # The whole chain: Flower logs the traceback.
    text = told() + "".join(traceback.format_exception(caught.value))
    assert WORD not in text
    assert not [path for path, content in written(folder).items() if WORD.encode() in content]
