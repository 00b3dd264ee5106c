"""`hafl report` and `hafl plots` on folders of runs: what they write and say."""

import pytest
from written_runs import write_run

from hafl_app.commands.main import main


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs, of which one did not finish; the test is beside them."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", strategy="fedit")
    write_run(tmp_path / "runs" / "b", (0.1, 0.7), strategy="hafl")
    write_run(tmp_path / "runs" / "c", strategy="hetlora", status="failed")
    return tmp_path


def said(capsys, line):
    code = main(line.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_report_is_written_and_its_tables_are_shown(runs, capsys):
    code, out, err = said(capsys, "report runs --baseline hafl --figures png")
    assert code == 0
    assert "Difference from hafl" in out
    assert "| fedit |      -20.0 |  none (n = 1) |   1 |" in out
    assert "Written: report.html, report.md, report.tex and figures in report" in out
    assert err == "warning: left out: runs/c: not finished, after 1 rounds\n"
    assert (runs / "report" / "figures" / "curves.png").exists()
    # Again over the first, and not over anything else.
    assert said(capsys, "report runs")[0] == 0
    code, out, err = said(capsys, "report runs --output runs")
    assert (code, out) == (2, "")
    assert err == "error: --output runs: it holds something else than a report\n"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("report nope", "nope: no such folder"),
        ("report runs/c", "no finished run: runs/c: not finished, after 1 rounds"),
        ("report runs --baseline hafll", "there are fedit, hafl; did you mean 'hafl'?"),
        ("report runs --figures gif", "'gif' is not one of 'svg', 'pdf', 'png'"),
        ("plots bytes runs", "runs: no readable metrics.jsonl, so no run"),
        ("plots energy runs/a", "runs/a: no adapter was saved"),
        ("plots curves runs/a --output a.gif", "a.gif: expected a name that ends in .png, .svg"),
        ("plots labels runs/a seed=1", "expected a run's folder, or settings, not both"),
        ("plots labels dataset=on_device", "what classes the nodes have is theirs to know"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(line, answer, runs, capsys):
    code, out, err = said(capsys, line)
    assert (code, out) == (2, "")
    assert answer in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in runs.iterdir()] == ["runs"]


@pytest.mark.parametrize("kind", ["curves", "labels", "importance"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_figure_is_written_by_its_suffix(kind, suffix, runs, capsys):
    code, out, _ = said(capsys, f"plots {kind} runs/a --output f.{suffix}")
    assert code == 0
    assert out.startswith(f"Written: f.{suffix}\n")
    assert b"<svg" in (runs / "f.svg").read_bytes() if suffix == "svg" else True
    assert (runs / f"f.{suffix}").stat().st_size > 5000


def test_classes_of_clients_are_drawn_before_there_is_a_run(runs, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "hafl_app.reports.figures.heat_maps.labels_by_client", lambda *given: drawn.append(given)
    )
    monkeypatch.setattr("hafl_app.reports.figures.style.save", lambda *_: None)
    line = "plots labels dataset=synthetic dataset.num_train=100 federation.num_clients=5"
    assert said(capsys, line)[0] == 0
    ((frame, title),) = drawn
    assert frame.shape == (20, 5)
    assert 0 < frame.to_numpy().sum() <= 100
    assert title == "synthetic, iid, seed 0"
