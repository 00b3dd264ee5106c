"""Several processes start at once on empty caches: the work is done once, and none reads half."""

import http.server
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest

from hafl_app.data import text
from hafl_app.data.text import encode
from hafl_app.training.locate import locate
from hafl_app.training.settings import BaseSpec

pytestmark = pytest.mark.slow

TEXTS = [f"text number {i} of them" for i in range(300)]
LABELS = [i % 7 for i in range(300)]
EXPECTED = [[ord(letter) for letter in t] for t in TEXTS]
FORK = multiprocessing.get_context("fork")


def tokenize_slowly(calls: Path, seconds: float):
    """Return a tokenizer that leaves a file for every call."""

    def tokenize(texts):
        (calls / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(seconds)
        return [[ord(letter) for letter in t] for t in texts]

    return tokenize


def at_once(number: int, work, *arguments) -> list[int]:
    """Run the same in several processes that wait for each other; return their exit codes."""
    barrier = FORK.Barrier(number)

    def begin():
        barrier.wait(30)
        work(*arguments)

    processes = [FORK.Process(target=begin) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


def encode_and_check(cache, calls, seconds=0.5, key="k"):
    encoded = encode(TEXTS, LABELS, tokenize_slowly(calls, seconds), cache, key)
    assert [encoded.row(i).tolist() for i in range(len(encoded))] == EXPECTED
    assert encoded.labels.tolist() == LABELS


@pytest.fixture
def calls(tmp_path):
    (tmp_path / "calls").mkdir()
    return tmp_path / "calls"


class TestTokens:
    def test_one_of_many_tokenizes(self, tmp_path, calls):
        assert at_once(5, encode_and_check, tmp_path / "new" / "cache", calls) == [0] * 5

        assert len(list(calls.iterdir())) == 1
        assert [p.suffix for p in (tmp_path / "new" / "cache").glob("*.*")] == [".npz"]

    def test_other_texts_do_not_wait(self, tmp_path, calls):
        first = FORK.Process(target=encode_and_check, args=(tmp_path / "cache", calls, 30.0))
        first.start()
        try:
            while not list(calls.iterdir()):
                time.sleep(0.01)

            encode_and_check(tmp_path / "cache", calls, 0.0, key="other")

            assert first.is_alive()
        finally:
            first.kill()
            first.join()

    def test_who_is_killed_in_the_middle_holds_up_nobody(self, tmp_path, calls):
        killed = FORK.Process(target=encode_and_check, args=(tmp_path / "cache", calls, 60.0))
        killed.start()
        while not list(calls.iterdir()):
            time.sleep(0.01)
        killed.kill()
        killed.join()

        assert at_once(3, encode_and_check, tmp_path / "cache", calls) == [0] * 3

        assert len(list(calls.iterdir())) == 2  # the killed one, and one other

    def test_who_hangs_is_waited_for_only_so_long(self, tmp_path, calls, monkeypatch, caplog):
        monkeypatch.setattr(text, "_WAIT_SECONDS", 0.3)
        hanging = FORK.Process(target=encode_and_check, args=(tmp_path / "cache", calls, 60.0))
        hanging.start()
        try:
            while not list(calls.iterdir()):
                time.sleep(0.01)
            os.kill(hanging.pid, signal.SIGSTOP)

            encode_and_check(tmp_path / "cache", calls, 0.0)

            assert "another process does not finish it" in caplog.text
        finally:
            hanging.kill()
            hanging.join()


FILES = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": b"w" * 300_000,
    "tokenizer.json": b"{}" * 40_000,
    "vocab.txt": b"word\n" * 2_000,
    "pytorch_model.bin": b"never asked for",
}
COMMIT = "c" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a snapshot needs; slow, so that downloads overlap."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        if "/api/" in self.path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{i:040x}"}
                for i, (name, content) in enumerate(FILES.items())
            ]
            info = {"id": "some/model", "sha": COMMIT, "siblings": []}
            self._send(json.dumps(entries if "/tree/" in self.path else info).encode(), {}, body)
            return
        name = self.path.rpartition("/")[2]
        if body:
            self.server.fetched.append(name)
            time.sleep(0.3)
        etag = f'"{list(FILES).index(name):040x}"'
        self._send(FILES[name], {"ETag": etag, "X-Repo-Commit": COMMIT}, body)

    def _send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
        # Part of a file where a download goes on.
        start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
        self.send_response(206 if start else 200)
        for key, value in {"Content-Length": str(len(content) - start), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


class TestModels:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        server.fetched = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield server
        server.shutdown()
        server.server_close()

    def test_a_model_is_downloaded_once_and_nobody_gets_half_of_it(self, hub):
        def check():
            folder = locate(BaseSpec("some/model", revision=COMMIT))
            wanted = {n: c for n, c in FILES.items() if n != "pytorch_model.bin"}
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == wanted

        assert at_once(4, check) == [0] * 4

        assert sorted(hub.fetched) == sorted(FILES.keys() - {"pytorch_model.bin"})

    def test_an_unfinished_download_is_not_taken_for_the_model(self, hub):
        folder = locate(BaseSpec("some/model", revision=COMMIT))
        (folder / "tokenizer.json").unlink()  # as if the download had been killed

        assert locate(BaseSpec("some/model", revision=COMMIT)) == folder
        assert (folder / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
