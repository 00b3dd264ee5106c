"""The page: who may ask, what is shown, and that it never writes."""

import json
import re
import time

import pytest
from run_folders import HOSTILE, NODE_IDS, client_record, log_round, tree, write_run
from starlette.testclient import TestClient

from hafl_app.dashboard.app import dashboard
from hafl_app.run.run_lock import run_lock
from hafl_app.tracking.jsonl import JsonlTracker


@pytest.fixture
def root(tmp_path):
    write_run(tmp_path / "outputs" / "day" / "one", method="hafl")
    write_run(tmp_path / "outputs" / "day" / "two", method="flexlora", seed=1, end="failed")
    return tmp_path / "outputs"


@pytest.fixture
def ask(root):
    app = dashboard(root, ["127.0.0.1", "localhost"])
    with TestClient(app, base_url="http://127.0.0.1:8050", follow_redirects=False) as client:
        yield client.get


class TestWho:
    @pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost", "localhost:1"])
    def test_the_loopbacks_names_are_answered(self, ask, host):
        assert ask("/", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "127.0.0.1.evil.example", "www.localhost", "[::1]:8050", ""]
    )
    @pytest.mark.parametrize("path", ["/", "/run?run=day/one", "/static/live.js", "/curves.svg"])
    def test_a_foreign_host_is_refused(self, ask, host, path):
        answer = ask(path, headers={"host": host})
        assert answer.status_code == 400
        assert "day" not in answer.text

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    @pytest.mark.parametrize("path", ["/", "/run?run=day/one"])
    def test_it_only_reads(self, ask, method, path):
        client = ask.__self__
        assert client.request(method, path).status_code == 405

    def test_nothing_is_written(self, ask, root):
        before = tree(root)
        for path in ("/", "/run?run=day/one", "/curves.svg?run=day/one&phase=test"):
            assert ask(path).status_code == 200
        after = tree(root)
        assert before.keys() == after.keys()
        for name, (content, status) in before.items():
            assert after[name][0] == content
            assert after[name][1].st_mtime_ns == status.st_mtime_ns

    @pytest.mark.parametrize("path", ["/", "/none", "/run?run=none", "/static/style.css"])
    def test_every_answer_forbids_what_is_not_its_own(self, ask, path):
        headers = ask(path).headers
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


class TestPaths:
    @pytest.mark.parametrize(
        "query",
        ["../outside", "/etc", "day/../../outside", "%2e%2e/outside", "link", "", "day", "a%00b"],
    )
    @pytest.mark.parametrize("page", ["run", "heat.svg", "curves.svg"])
    def test_no_name_leads_out_of_the_root(self, ask, root, page, query):
        write_run(root.parent / "outside")
        (root / "link").symlink_to(root.parent / "outside")
        answer = ask(f"/{page}?run={query}&phase=test&heat=loss")
        assert answer.status_code == 404
        assert str(root.parent) not in answer.text

    @pytest.mark.parametrize(
        "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/../etc/hosts"]
    )
    def test_nor_does_a_path(self, ask, path):
        assert ask(path).status_code == 404


class TestRuns:
    def test_all_are_listed_with_what_they_are(self, ask):
        text = ask("/").text
        assert "2 runs: 1 finished, 1 failed" in text
        assert 'href="/run?run=day%2Fone"' in text
        for cell in ("flexlora", "hafl", "synthetic", "minilm", "test 75.0%", "9.00 MB"):
            assert cell in text

    @pytest.mark.parametrize(
        ("query", "shown"),
        [
            ("q=flexlora", ["two"]),
            ("q=SYNTHETIC+seed=0", ["one"]),
            ("state=failed", ["two"]),
            ("state=finished&q=flexlora", []),
            ("state=running", []),
            ("q=day", ["one", "two"]),
        ],
    )
    def test_they_are_filtered_by_words_and_state(self, ask, query, shown):
        text = ask(f"/?{query}").text
        assert sorted(re.findall(r'value="day/(\w+)"', text)) == shown
        assert ("No run fits." in text) == (not shown)

    def test_their_own_names_and_tags_are_shown_and_filter(self, ask, root):
        write_run(root / "named", name="for the paper", tags=["final", 2])
        assert '<span class="label">for the paper final 2</span>' in ask("/").text
        assert re.findall(r'value="(named|day/\w+)"', ask("/?q=paper+final").text) == ["named"]

    def test_chosen_ones_are_drawn_over_each_other(self, ask):
        text = ask("/?run=day/one&run=day/two").text
        (source,) = re.findall(r'<img src="([^"]+)"', text)
        answer = ask(source.replace("&amp;", "&"))
        assert answer.headers["content-type"] == "image/svg+xml"
        assert {"day/one", "day/two"} <= set(re.findall(r">([^<>]+)</text>", answer.text))

    def test_an_empty_folder_says_so(self, tmp_path):
        (tmp_path / "outputs").mkdir()
        client = TestClient(dashboard(tmp_path / "outputs", ["testserver"]))
        assert "No run here yet" in client.get("/").text


class TestRun:
    def test_why_it_failed_is_shown(self, ask):
        assert "out of luck" in ask("/run?run=day/two").text

    def test_its_figures_are_there(self, ask):
        text = ask("/run?run=day/one").text
        sources = re.findall(r'<img src="([^"]+)"', text)
        assert len(sources) == 2
        for source in sources:
            assert ask(source.replace("&amp;", "&")).content.startswith(b"<?xml")

    @pytest.mark.parametrize("heat", ["components", "loss", "seconds", "uploaded", "failures"])
    def test_each_heat_map_can_be_chosen(self, ask, heat):
        text = ask(f"/run?run=day/one&heat={heat}").text
        assert f"heat={heat}&amp;v=" in text
        assert ask(f"/heat.svg?run=day/one&heat={heat}").status_code == 200

    def test_importance_is_shown_where_it_was_recorded(self, ask, root):
        assert "heat=importance" not in ask("/run?run=day/one").text
        record = {"kind": "importance", "server_round": 2, "measure": "share of energy"}
        line = json.dumps(record | {"modules": {"layer.0": [1.0, 2.0]}})
        (root / "day/one/details.jsonl").write_text(line + "\n")
        assert "heat=importance" in ask("/run?run=day/one").text
        drawn = ask("/heat.svg?run=day/one&heat=importance").text
        assert "(share of energy) after round 2" in drawn

    def test_it_is_read_again_while_it_goes(self, ask, root):
        with run_lock(root / "now"):
            tracker = JsonlTracker(root / "now")
            tracker.start({}, ())
            for server_round in range(3):
                log_round(tracker, server_round)
                text = ask("/run?run=now").text
                assert f"<dd>{server_round}</dd>" in text
                assert 'class="state running"' in text


class TestAnswers:
    def add(self, folder, **parts):
        file = folder / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | parts))

    def test_neither_is_shown_of_a_run_without_them(self, ask):
        text = ask("/run?run=day/one").text
        assert "stopped early" not in text
        assert "Answers" not in text

    def test_an_early_end_is_a_line(self, ask, root):
        why = {"round": 7, "of": 20, "reason": "no better loss for 3 rounds"}
        self.add(root / "day/one", stopped_early=why)
        line = "<p>stopped early after round 7 of 20: no better loss for 3 rounds</p>"
        assert line in ask("/run?run=day/one").text

    def test_the_last_answers_to_watched_prompts_are_there_to_open(self, ask, root):
        for number, answer in enumerate(["I do not know", "", HOSTILE]):
            said = [{"prompt": "Who?", "expected": "me", "category": "", "answer": answer}]
            record = {"kind": "answers", "server_round": number, "answers": said}
            with (root / "day/one/details.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            text = ask("/run?run=day/one").text
            assert f"adapter after round {number}</summary>" in text
            cells = re.findall(r"<td>(.*?)</td>", text[text.index("<details") :])[:3]
            assert cells[:2] == ["Who?", "me"]
            assert cells[2] == {"": "(nothing)"}.get(answer, answer) or "&lt;script&gt;" in cells[2]
        assert "I do not know" not in text
        assert "<img src=x" not in text

    def test_scores_of_clients_answers_are_a_table(self, ask, root):
        worst = {"rouge-l": 0.125, "exact-match": None}
        seen = {"rouge-l": 0.5, "exact-match": 0.25, "worst_tenth": worst}
        seen |= {"clients": 4, "num_examples": 8}
        self.add(root / "day/one", client_generation={"seen": seen, "unseen": {"clients": HOSTILE}})
        rows = re.findall(
            r'<th scope="row">(\w+)</th>(.*?)</tr>', ask("/run?run=day/one").text, re.S
        )
        cells = {who: re.findall(r">([^<>]*)</td>", row) for who, row in rows}
        assert cells["seen"] == ["4", "8", "50.0%", "12.5%", "25.0%", "-"]
        assert cells["unseen"] == ["-"] * 6

    @pytest.mark.parametrize("damage", [3, [], {"seen": 3}, {"seen": {"worst_tenth": []}}])
    def test_a_summary_of_another_form_is_shown_without_them(self, ask, root, damage):
        self.add(root / "day/one", stopped_early=damage, client_generation=damage)
        assert ask("/run?run=day/one").status_code == 200


class TestFleet:
    def nodes(self, text):
        rows = re.findall(r'<tr data-node="(\d+)">(.*?)</tr>', text, re.DOTALL)
        return {int(n): re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for n, row in rows}

    def said(self, **changes):
        node = {"node_id": NODE_IDS[0], "name": "phone", "connected": True, "closed": None}
        node |= {"last_call": time.time() - 2, "call": "pull-messages", **changes}
        return json.dumps({"written": time.time(), "nodes": [node]})

    def test_a_node_has_rank_device_failures_and_bytes(self, ask, root):
        clients = [{"node_id": NODE_IDS[0], "partition_id": 0, "rank": 2, "device": "A phone"}]
        (root / "day/one/clients.json").write_text(json.dumps({"clients": clients}))
        cells = self.nodes(ask("/run?run=day/one").text)[NODE_IDS[0]]
        assert cells[0] == str(NODE_IDS[0])
        assert cells[2:5] == ["0", "2", "A phone"]
        assert cells[5:] == ["-", "reply of round 3", "3", "0", "3.00 MB", "0.900 MB"]

    def test_one_that_the_fence_no_longer_hears_is_gone(self, ask, root):
        (root / "day/one/logs").mkdir()
        file = root / "day/one/logs/fleet.json"
        file.write_text(self.said())
        assert ">online<" in self.nodes(ask("/run?run=day/one").text)[NODE_IDS[0]][5]
        ago = time.time() - 5
        file.write_text(self.said(connected=False, closed=ago, last_call=ago))
        cells = self.nodes(ask("/run?run=day/one").text)[NODE_IDS[0]]
        assert ">gone<" in cells[5]
        assert cells[6] == "5 s ago"

    def test_another_file_may_be_named(self, root, tmp_path):
        (tmp_path / "fleet.json").write_text(self.said())
        client = TestClient(dashboard(root, ["testserver"], tmp_path / "fleet.json"))
        assert ">online<" in self.nodes(client.get("/run?run=day/one").text)[NODE_IDS[0]][5]

    def test_a_damaged_one_is_a_line(self, ask, root):
        (root / "day/one/logs").mkdir()
        (root / "day/one/logs/fleet.json").write_text("[")
        text = ask("/run?run=day/one").text
        assert "fleet.json: not an object of JSON" in text
        assert len(self.nodes(text)) == 3


class TestForeignText:
    """What nodes, files and addresses say is text, wherever it stands."""

    def test_it_is_escaped_everywhere(self, tmp_path):
        folder = tmp_path / "outputs" / HOSTILE.replace("/", "|")
        hostile = {"strategy": {"_target_": f"a.{HOSTILE}.B"}, "dataset": {"source": HOSTILE}}
        write_run(folder, end="failed", reason=HOSTILE, method="hafl", **hostile)
        tracker_line = {"kind": "client", **vars(client_record(2, 0, error=HOSTILE))}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(tracker_line) + "\n" + HOSTILE + "\n")
        clients = [{"node_id": NODE_IDS[1], "partition_id": 1, "rank": 4, "device": HOSTILE}]
        left_out = {"7": HOSTILE, HOSTILE: HOSTILE}
        content = json.dumps({"clients": clients, "left_out": left_out})
        (folder / "clients.json").write_text(content)
        (folder / "logs").mkdir()
        node = {"node_id": 8, "name": HOSTILE, "last_call": time.time(), "call": HOSTILE}
        said = {"written": time.time(), "nodes": [node]}
        (folder / "logs" / "fleet.json").write_text(json.dumps(said))
        client = TestClient(dashboard(tmp_path / "outputs", ["testserver"]))
        run = {"run": folder.name, "heat": HOSTILE, "phase": HOSTILE, "q": "", "state": HOSTILE}
        index = client.get("/", params=run | {"state": ""}).text
        shown = client.get("/run", params=run).text
        # Name and data set; and reason, devices, errors, the fence's name, what is left out.
        assert index.count("&lt;script&gt;") == 3
        assert shown.count("&lt;script&gt;") == 8
        for text in (index, shown, client.get("/", params=run | {"q": HOSTILE}).text):
            assert "<img src=x" not in text
            assert text.count("<script") == 1  # our own

    @pytest.mark.parametrize("odd", ["a\nb", "a\u202eb", "a\x1b[2Jb", "a\x00b"])
    def test_it_moves_nothing_on_the_page(self, ask, root, odd):
        clients = [{"node_id": NODE_IDS[0], "partition_id": 0, "rank": 2, "device": odd}]
        (root / "day/one/clients.json").write_text(json.dumps({"clients": clients}))
        text = ask("/run?run=day/one").text
        assert odd not in text
        assert "a" in text


@pytest.mark.parametrize("damage", ["metrics.jsonl", "summary.json", "config.yaml"])
def test_a_damaged_folder_opens_with_a_line(ask, root, damage):
    (root / "day/one" / damage).write_bytes(b"\xff[\n")
    assert ask("/").text.count(">damaged<") == 1
    assert f'<p class="fault">{damage}' in ask("/run?run=day/one").text
