import json

import pytest
from benchmarks import bytes as benchmark
from benchmarks.bytes import METHODS, Sizes, measure, measure_all, minilm_shapes
from benchmarks.timing import DisagreementError
from programs import run_program

ONE_LAYER = minilm_shapes(1)
WIDTHS = 4 * 768 + 2 * 1920  # of MiniLM's six adapted weights of a layer, both sides together


def test_shapes_are_minilms():
    shapes = minilm_shapes(6)
    assert len(shapes) == 36
    assert sum(s.out_features + s.in_features for s in ONE_LAYER.values()) == WIDTHS


def test_every_method_rank_and_format_is_measured():
    results = list(measure_all(list(METHODS), [2, 3], ["fp32", "bf16", "int8"], ONE_LAYER, 4))

    assert len({(m.method, m.rank, m.upload) for m in results}) == len(METHODS) * 2 * 3
    for one in results:
        held = 4 if one.method == "hafl" else one.rank  # freezing sends the whole adapter
        assert one.down.ideal == 4 * held * WIDTHS
        number = {"fp32": 4, "bf16": 2, "int8": 1}[one.upload]
        assert one.up.ideal == number * one.rank * WIDTHS
        assert one.up.head > 4 * 77 * 385
        assert one.up.overhead > 0 < one.down.overhead
        assert set(one.row()) == set(results[0].row())


@pytest.mark.parametrize("upload", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("method", ["hafl, truncation", "flexlora"])
def test_two_per_cent_are_enough_for_all_of_minilm_at_rank_2(method, upload):
    one = measure(method, 2, upload, minilm_shapes(6), 8)

    assert one.down.overhead < 0.02
    assert one.up.overhead < 0.02


def test_overhead_is_what_is_sent_beyond_the_numbers():
    assert Sizes(sent=102, ideal=100, head=7).overhead == pytest.approx(0.02)


@pytest.mark.parametrize("upload", ["fp32", "bf16", "int8"])
def test_a_message_that_means_something_else_is_never_measured(upload, monkeypatch):
    right = benchmark._answer

    def wrong(request):
        reply, trained = right(request)
        trained.tensors()["lora_B/encoder.layer.0.attention.self.key"][2, 1] += 0.001
        return reply, trained

    monkeypatch.setattr(benchmark, "_answer", wrong)

    with pytest.raises(DisagreementError, match=rf"lora_B/.*key: differs by more than {upload}"):
        measure("zero_padding", 2, upload, ONE_LAYER, 4)


def test_a_reply_that_is_refused_is_never_measured(monkeypatch):
    monkeypatch.setitem(benchmark._METRICS, "num-examples", 10**9)

    with pytest.raises(DisagreementError, match="rejected: num-examples"):
        measure("zero_padding", 2, "fp32", ONE_LAYER, 4)


def test_the_command_prints_a_table_and_writes_it(tmp_path):
    arguments = ["--ranks", "2", "--methods", "fedit", "--json", tmp_path / "bytes.json"]

    result = run_program("scripts/bench_bytes.py", "--layers", "1", *arguments)

    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("| fedit | 2 |") == 3
    written = json.loads((tmp_path / "bytes.json").read_text())
    assert written["messages"][0]["up"]["ideal"] == 4 * 2 * WIDTHS
    assert written["machine"]["cores"] >= 1
