import json

from benchmarks.bytes import minilm_shapes
from benchmarks.haflq import measure_clients, summary
from programs import run_program

ONE_LAYER = minilm_shapes(1)
WIDTHS = 6912  # of MiniLM's six adapted weights of a layer, both sides together


def test_ten_clients_upload_what_their_uplink_carries_and_no_more():
    clients = list(measure_clients(0.25, ONE_LAYER))

    assert [c.rank for c in clients] == [2, 2, 2, 4, 4, 4, 8, 8, 8, 8]
    assert [c.distance_m for c in clients] == list(range(1100, 2001, 100))
    for client in clients:
        assert client.budget == int(client.rate_bps * 0.25 / 8)
        assert 0 < client.factors <= client.budget
        assert client.factors < client.mixed < client.factors + 4000
        assert sum(client.bits.values()) == 6 * client.rank
        assert client.fp32 > 4 * client.rank * WIDTHS > client.int8 > client.rank * WIDTHS
        assert set(client.row()) == set(clients[0].row())
    assert min(clients[-1].bits) < min(clients[0].bits)  # the farthest has the most to say


def test_the_summary_adds_up():
    clients = list(measure_clients(0.25, ONE_LAYER))
    mixed, fp32 = sum(c.mixed for c in clients), sum(c.fp32 for c in clients)

    assert f"all 10: HAFLQ {mixed:,} bytes, HAFL fp32 {fp32:,}," in summary(clients)
    assert f"HAFLQ {mixed / fp32 - 1:+.1%}, int8" in summary(clients)
    assert "-49%" in summary(clients)


def test_the_command_prints_a_table_for_each_time_and_writes_them(tmp_path):
    arguments = ["--seconds", "0.1", "1", "--json", tmp_path / "haflq.json"]

    result = run_program("scripts/bench_haflq.py", "--layers", "1", *arguments)

    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("| 2000 | 8 |") == 2
    written = json.loads((tmp_path / "haflq.json").read_text())
    assert len(written["clients"]["0.1"]) == 10
