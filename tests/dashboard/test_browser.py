"""The page in a real headless Chromium: it updates by itself, and runs no code but its own."""

import json
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from run_folders import HOSTILE, NODE_IDS, client_record, log_round, write_run

from hafl_app.dashboard.app import dashboard
from hafl_app.tracking.jsonl import JsonlTracker

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
pytestmark = pytest.mark.browser


@pytest.fixture(scope="session")
def chromium():
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    return found


class Browser:
    """Opens a page as a person would, for some seconds of its own clock."""

    def __init__(self, program, profile):
        self._command = [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *(f"--user-data-dir={profile}", "--enable-logging=stderr", "--hide-scrollbars"),
        ]

    def open(self, address, *arguments, seconds=1):
        done = subprocess.run(
            [*self._command, f"--virtual-time-budget={seconds * 1000}", *arguments, address],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, errors

    def read(self, address, seconds=1):
        """Return the page as the browser has it at the end, and what its console says."""
        return self.open(address, "--dump-dom", seconds=seconds)


@pytest.fixture
def browser(chromium, tmp_path):
    return Browser(chromium, tmp_path / "profile")


@contextmanager
def serving(root, on_request=lambda count: None):
    """Serve the page; `on_request` is called with the number of each page that is asked for."""
    app, count = dashboard(root, ["127.0.0.1"]), 0

    async def counted(scope, receive, send):
        nonlocal count
        if scope["type"] == "http" and scope["path"] in {"/", "/run"}:
            count += 1
            on_request(count)
        await app(scope, receive, send)

    config = uvicorn.Config(counted, port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_a_run_that_goes_on_is_shown_without_a_reload(browser, tmp_path):
    tracker = JsonlTracker(tmp_path / "outputs" / "now")
    tracker.start({}, ())
    log_round(tracker, 0)
    with serving(tmp_path / "outputs", lambda count: log_round(tracker, count)) as address:
        page, errors = browser.read(f"{address}/run?run=now", seconds=9)
    assert int(re.search(r"<dt>round</dt><dd>(\d+)</dd>", page).group(1)) >= 4
    assert not errors


def test_a_node_that_goes_is_shown_without_a_reload(browser, tmp_path):
    folder = write_run(tmp_path / "outputs" / "one")
    (folder / "logs").mkdir()

    def say(count):
        now = time.time()
        left = {"connected": count == 1, "closed": now - 6 if count > 1 else None}
        node = {"node_id": NODE_IDS[0], "name": "phone", "call": "pull-messages", **left}
        said = {"written": now, "nodes": [node | {"last_call": now - 6}]}
        (folder / "logs" / "fleet.json").write_text(json.dumps(said))

    with serving(tmp_path / "outputs", say) as address:
        page, errors = browser.read(f"{address}/run?run=one", seconds=5)
    assert '<span class="state gone">gone</span>' in page
    assert not errors


def test_the_table_changes_around_the_curves_of_chosen_runs(browser, tmp_path):
    write_run(tmp_path / "outputs" / "one")
    tracker = JsonlTracker(tmp_path / "outputs" / "now")
    tracker.start({}, ())
    log_round(tracker, 0)
    with serving(tmp_path / "outputs", lambda count: log_round(tracker, count)) as address:
        page, errors = browser.read(f"{address}/?run=one", seconds=7)
    rounds = re.search(r'value="now".*?<td class="n">(\d+)</td>', page, re.DOTALL).group(1)
    assert int(rounds) >= 3
    assert page.count("<img") == 1
    assert not errors


def test_foreign_text_runs_nothing(browser, tmp_path):
    folder = tmp_path / "outputs" / HOSTILE.replace("/", "|")
    write_run(folder, end="failed", reason=HOSTILE, dataset={"source": HOSTILE})
    line = {"kind": "client", **vars(client_record(2, 0, error=HOSTILE))}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with serving(tmp_path / "outputs") as address:
        page, errors = browser.read(f"{address}/?q=synthetic&state={HOSTILE}", seconds=5)
        index, more = browser.read(f"{address}/", seconds=5)
    assert "owned" not in re.search(r"<title>(.*?)</title>", index).group(1)
    assert "owned" in index  # as text
    assert page.count("<script") == index.count("<script") == 1
    assert not errors + more


def test_a_screenshot_has_the_page(browser, tmp_path):
    write_run(tmp_path / "outputs" / "one")
    shot = tmp_path / "page.png"
    with serving(tmp_path / "outputs") as address:
        browser.open(f"{address}/run?run=one", f"--screenshot={shot}", "--window-size=1200,1000")
    assert shot.stat().st_size > 20_000
