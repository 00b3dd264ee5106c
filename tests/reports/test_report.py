"""Reports from end to end on written folders: numbers by hand, pages that need nothing else."""

import json
import re
from html.parser import HTMLParser

import pytest
from written_runs import write_adapter, write_run

from hafl_app.reports.content import report_on
from hafl_app.reports.records import UnreadableRunError
from hafl_app.reports.writing import svg_address, write_report

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def sweep(tmp_path):
    """Two methods on three seeds; the second is 0.1, 0.2 and 0.3 better."""
    for seed, (base, better) in enumerate([(0.5, 0.6), (0.4, 0.6), (0.3, 0.6)]):
        write_run(tmp_path / f"a{seed}", (0.1, base), seed=seed, strategy="fedit")
        write_run(tmp_path / f"b{seed}", (0.1, better), seed=seed, strategy="hafl", simulated=5.0)
    return tmp_path


def table(report, title):
    (chapter,) = report.chapters
    (found,) = (t for t in chapter.tables if t.title == title)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


class TestNumbers:
    def test_mean_and_spread_over_seeds(self, sweep):
        fedit, hafl = table(report_on([sweep]), "Test accuracy in percent")
        # Of 0.5, 0.4 and 0.3 the mean is 0.4 and the deviation 0.1.
        assert (fedit["n"], fedit["test, last round"]) == ("3", "40.0 ± 10.0")
        assert hafl["test, last round"] == "60.0 ± 0.0"
        assert (fedit["MB down"], fedit["MB up"], fedit["client CPU s"]) == ("3.00", "1.00", "8.00")
        assert (fedit["simulated s"], hafl["simulated s"]) == ("-", "5.00")

    def test_the_interval_of_paired_differences(self, sweep):
        (row,) = table(report_on([sweep]), "Difference from fedit")
        # 10, 20 and 30 points: 20 +- 4.3027 * 10 / sqrt(3), with t of 97.5 % at 2 degrees.
        assert row == {
            "runs": "hafl",
            "difference": "+20.0",
            "95 % interval": "-4.8 to +44.8",
            "n": "3",
        }

    def test_one_seed_says_so_and_has_no_interval(self, tmp_path):
        write_run(tmp_path / "a", strategy="fedit")
        write_run(tmp_path / "b", (0.1, 0.6), strategy="hafl")
        report = report_on([tmp_path])
        (row,) = table(report, "Difference from fedit")
        assert (row["difference"], row["95 % interval"], row["n"]) == ("+10.0", "none (n = 1)", "1")
        fedit, _ = table(report, "Test accuracy in percent")
        assert (fedit["n"], fedit["test, last round"]) == ("1", "50.0")

    def test_seeds_that_one_lacks_are_no_pairs(self, sweep):
        write_run(sweep / "b9", (0.1, 0.9), seed=9, strategy="hafl", simulated=5.0)
        report = report_on([sweep])
        (row,) = table(report, "Difference from fedit")
        assert (row["difference"], row["n"]) == ("+20.0", "3")
        assert table(report, "Test accuracy in percent")[1]["n"] == "4"

    def test_slices_have_scores_and_paired_differences(self, tmp_path):
        for seed, phone in enumerate((0.41, 0.42, 0.43)):
            write_run(tmp_path / f"a{seed}", seed=seed, strategy="hafl", slices={2: 0.4, 8: 0.5})
            write_run(
                tmp_path / f"b{seed}", seed=seed, strategy="hetlora", slices={2: phone, 8: 0.6}
            )
        write_run(tmp_path / "c", strategy="fedit", slices={4: 0.5})
        report = report_on([tmp_path], "hafl")
        hafl, hetlora, fedit = table(report, "Test accuracy in percent by rank of device")
        assert hafl == {"runs": "hafl", "rank 2": "40.0 ± 0.0", "rank 8": "50.0 ± 0.0"}
        assert hetlora["rank 2"] == "42.0 ± 1.0"
        assert fedit == {"runs": "fedit", "rank 2": "-", "rank 8": "-"}  # one rank for all
        (row,) = table(report, "Difference from hafl by rank of device")
        # 1, 2 and 3 points: 2 +- 4.3027 / sqrt(3).
        assert row["rank 2"] == "+2.0 (-0.5 to +4.5), 3"
        beside = table(report_on([tmp_path], "fedit"), "Test accuracy in percent by rank of device")
        assert len(beside) == 3
        titles = [t.title for t in report_on([tmp_path], "fedit").chapters[0].tables]
        assert "Difference from fedit by rank of device" not in titles

    def test_worst_mean_and_best_client_by_rank(self, tmp_path):
        # Ranks 2, 2, 4 and 8.
        write_run(tmp_path / "a", clients=(0.2, 0.4, 0.6, 0.8))
        write_run(tmp_path / "b", clients=(0.4, 0.6, 0.6, 0.0), seed=1)
        rows = table(report_on([tmp_path]), "Worst, mean and best client by rank")
        by_rank = {row["rank"]: row for row in rows}
        assert [*by_rank] == ["2", "4", "8", "all"]
        assert (by_rank["2"]["clients"], by_rank["2"]["n"]) == ("2", "2")
        # 0.2 and 0.4 in the first run, 0.4 and 0.6 in the second.
        assert by_rank["2"]["worst"] == "30.0 ± 14.1"
        assert by_rank["2"]["mean"] == "40.0 ± 14.1"
        assert by_rank["2"]["best"] == "50.0 ± 14.1"
        assert by_rank["all"]["worst tenth"] == "10.0 ± 14.1"  # one of four, at least

    def test_of_perplexities_the_lowest_is_best(self, tmp_path):
        keywords = {"metric": "perplexity", "clients": (20.0, 30.0, 40.0, 50.0)}
        write_run(tmp_path / "a", (60.0, 25.0), **keywords)
        rows = table(report_on([tmp_path]), "Worst, mean and best client by rank")
        everyone = rows[-1]
        assert (everyone["worst"], everyone["mean"], everyone["best"]) == (
            "50.00",
            "35.00",
            "20.00",
        )

    def test_settings_that_differ_and_those_alone(self, tmp_path):
        for number, rate in enumerate((0.01, 0.1)):
            client = {"learning_rate": rate, "batch_size": 8}
            write_run(tmp_path / str(number), client=client, seed=number)
        lines = table(report_on([tmp_path]), "Settings that differ")
        assert [line["client.learning_rate"] for line in lines] == ["0.01", "0.1"]
        assert all("batch_size" not in name for name in lines[0])


class TestPictures:
    def names(self, report):
        return [picture.name for chapter in report.chapters for picture in chapter.pictures]

    def test_every_figure_is_there(self, sweep):
        write_adapter(sweep / "a0", (2.0, 1.0))
        expected = {"curves", "clients", "ranks", "energy", "bytes", "labels", "importance"}
        assert expected <= set(self.names(report_on([sweep])))

    def test_simulated_time_has_a_curve_where_it_is_known(self, sweep):
        report = report_on([sweep])
        (curves,) = (p for p in report.chapters[0].pictures if p.name == "curves")
        assert [axes.get_xlabel() for axes in curves.figure.axes] == [
            "round",
            "sent so far, down and up (MB)",
            "simulated time so far (s)",
        ]
        (line,) = curves.figure.axes[2].lines  # of the method whose runs were on devices
        assert line.get_xdata().tolist() == [0, 5]

    def test_what_is_missing_is_said(self, tmp_path):
        folder = write_run(tmp_path / "run", clients=())
        report = report_on([folder])
        notes = " ".join(report.chapters[0].notes)
        assert "no run was on simulated devices" in notes
        assert "federation.fraction_evaluate above 0" in notes
        assert "clients" not in self.names(report)


class TestDamage:
    DAMAGES = (
        ("metrics.jsonl", "no json"),
        ("metrics.jsonl", '{"kind": "round"}\n' * 2),
        ("metrics.jsonl", '{"kind": "client"}\n' * 2),
        ("metrics.jsonl", '{"kind": "round", "server_round": 0, "metrics": 3}\n' * 2),
        ("metrics.jsonl", "[1, 2]\n" * 2),
        ("details.jsonl", '{"kind": "scores", "metrics": []}\n' * 2),
        ("details.jsonl", '{"kind": "importance", "modules": 1}\n' * 2),
        ("config.yaml", "a: [b"),
        ("config.yaml", "- a"),
        ("config.yaml", "seed: word"),
        ("data.json", '{"label_names": 5}'),
        ("data.json", "{"),
        ("summary.json", '{"status": "finished", "best_validation": {"round": 99}}'),
        ("summary.json", '{"status": "finished", "final": 5}'),
        ("summary.json", "{"),
    )

    @pytest.mark.parametrize(("name", "text"), DAMAGES, ids=range(len(DAMAGES)))
    def test_a_damaged_run_is_left_out_with_a_line(self, name, text, tmp_path):
        write_run(tmp_path / "good")
        damaged = write_run(tmp_path / "bad", seed=1)
        (damaged / name).write_text(text)
        report = report_on([tmp_path])
        (line,) = report.left_out
        assert line.startswith(str(damaged))
        assert "\n" not in line
        (row,) = table(report, "Test accuracy in percent")
        assert row["n"] == "1"

    def test_a_damaged_adapter_costs_its_energy_alone(self, tmp_path):
        damaged = write_run(tmp_path / "bad")
        (damaged / "adapter").mkdir()
        (damaged / "adapter" / "adapter_model.safetensors").write_bytes(b"no tensors")
        report = report_on([tmp_path])
        assert any("no readable adapter" in note for note in report.chapters[0].notes)
        assert not report.left_out

    def test_a_run_that_did_not_finish_is_left_out(self, tmp_path):
        write_run(tmp_path / "good")
        write_run(tmp_path / "bad", (0.1, 0.2, 0.3), status="failed")
        (line,) = report_on([tmp_path]).left_out
        assert line.endswith("not finished, after 2 rounds")

    def test_without_a_good_run_there_is_no_report(self, tmp_path):
        write_run(tmp_path / "bad", status="failed")
        with pytest.raises(UnreadableRunError, match=r"no finished run: .*not finished"):
            report_on([tmp_path])


class Page(HTMLParser):
    """Collects a page's tags, the addresses in it, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in {"src", "href", "action", "data", "srcset"}]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = folder / "runs"
    write_run(runs / f"a{EVIL.replace('/', '_')}", labels=(EVIL, "a_b & 5 %"))
    write_run(runs / "b", (0.1, 0.6), model={"name": EVIL + "&$_%#"})
    write_report(report_on([runs]), folder / "report", "svg")
    return folder / "report"


class TestPages:
    def test_all_files_are_there(self, written):
        names = {path.name for path in written.iterdir()}
        assert names == {"report.html", "report.md", "report.tex", "figures"}
        named = re.findall(r"\]\((figures/[^)]*)\)", (written / "report.md").read_text())
        assert sorted(named) == sorted(f"figures/{p.name}" for p in (written / "figures").iterdir())

    def test_the_page_needs_no_other_file_and_no_address(self, written):
        text = (written / "report.html").read_text()
        page = Page(text)
        assert not re.search("https?:", text)
        assert "//" not in re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", text)
        assert page.addresses
        assert all(a.startswith("data:image/svg+xml;base64,") for a in page.addresses)
        assert "link" not in page.tags
        assert "default-src 'none'" in text

    def test_what_comes_from_folders_is_escaped(self, written):
        page = Page((written / "report.html").read_text())
        assert "script" not in page.tags
        assert EVIL in page.text  # it is shown, as text

    def test_in_markdown_and_latex_too(self, written):
        assert "<script" not in (written / "report.md").read_text()
        latex = (written / "report.tex").read_text()
        assert r"\textless{}script\textgreater{}" in latex
        assert r"\&\$\_\%\#" in latex
        assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count("\\midrule")
        assert latex.count("{") == latex.count("}")

    @pytest.mark.parametrize(("suffix", "begins"), [("pdf", b"%PDF"), ("png", b"\x89PNG")])
    def test_figures_in_other_formats(self, suffix, begins, tmp_path):
        write_run(tmp_path / "run")
        write_report(report_on([tmp_path / "run"]), tmp_path / "report", suffix)
        figures = [*(tmp_path / "report" / "figures").iterdir()]
        assert {figure.suffix for figure in figures} == {f".{suffix}"}
        assert all(figure.read_bytes().startswith(begins) for figure in figures)

    def test_the_same_runs_are_the_same_figures(self, tmp_path):
        write_run(tmp_path / "run")
        reports = [report_on([tmp_path / "run"]) for _ in range(2)]
        for one, other in zip(*(report.chapters[0].pictures for report in reports), strict=True):
            if one.name in {"clients", "labels"}:
                assert svg_address(one) == svg_address(other)


def test_a_comparison_is_reported_cell_by_cell(tmp_path):
    for cell, scores in (("iid", (0.5, 0.6)), ("skewed", (0.3, 0.2))):
        for method, value in zip(("fedit", "hafl"), scores, strict=True):
            write_run(tmp_path / cell / method / "seed0", (0.1, value), strategy=method)
    (tmp_path / "results.json").write_text(json.dumps({"baseline": "hafl"}))
    report = report_on([tmp_path])
    assert [chapter.title for chapter in report.chapters] == ["iid", "skewed"]
    differences = [
        next(t for t in chapter.tables if t.title == "Difference from hafl").rows[0]
        for chapter in report.chapters
    ]
    assert [row[:2] for row in differences] == [["fedit", "-10.0"], ["fedit", "+10.0"]]
    names = [p.name for chapter in report.chapters for p in chapter.pictures]
    assert len(set(names)) == len(names)  # files of their own
