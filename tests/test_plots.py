"""Rank collapse on tiny settings, and curves of finished runs."""

import csv
import json

import pytest
import torch
from matplotlib import image

from hafl_app.experiments.collapse import energy_above
from hafl_app.lowrank.factors import Adapter, LoraFactors
from scripts import plots

TINY = (
    "model=tiny_random",
    "model.num_layers=null",
    "dataset.num_train=200",
    "dataset.num_test=40",
    "dataset.max_length=16",
    "federation.num_clients=4",
    "federation.num_rounds=4",
)


def main(monkeypatch, *arguments):
    monkeypatch.setattr(plots.sys, "argv", ["plots.py", *map(str, arguments)])
    return plots.main()


def test_energy_is_the_mean_over_modules():
    # Singular values 3, 2, 1: of the energy 14, above the first component 5; and a rank-1 module.
    diagonal = LoraFactors(torch.eye(3, 6), torch.eye(4, 3) * torch.tensor([3.0, 2.0, 1.0]))
    one = LoraFactors(torch.ones(1, 6), torch.ones(4, 1))
    assert energy_above(Adapter({"a": diagonal, "b": one}), 1) == pytest.approx(5 / 14 / 2)
    assert energy_above(Adapter({"a": diagonal}), 0) == pytest.approx(1.0)


@pytest.mark.slow
class TestRankCollapse:
    def test_writes_the_energy_of_every_method_seed_and_round(self, monkeypatch, tmp_path, capsys):
        folder = tmp_path / "out"
        arguments = ["rank-collapse", *TINY, "seeds=7", f"output_dir={folder}"]
        assert main(monkeypatch, *arguments) == 0

        with (folder / "rank_collapse.csv").open() as stream:
            lines = list(csv.DictReader(stream))
        energy = {
            (line["method"], int(line["seed"]), int(line["round"])): float(
                line["energy_above_smallest_rank"]
            )
            for line in lines
        }
        methods = ("flexlora", "flexlora_change", "zero_padding", "hafl")
        assert set(energy) == {(m, 7, r) for m in methods for r in range(1, 5)}
        assert all(0 <= value <= 1 for value in energy.values())
        # Before the first round there is nothing to keep: the change is the update.
        assert energy["flexlora", 7, 1] == pytest.approx(energy["flexlora_change", 7, 1])
        assert energy["zero_padding", 7, 4] < 0.3 * energy["zero_padding", 7, 1]
        assert energy["flexlora", 7, 4] < energy["flexlora_change", 7, 4]
        assert energy["zero_padding", 7, 4] < energy["hafl", 7, 4]
        assert image.imread(folder / "rank_collapse.png").std() > 0.01
        assert "rank_collapse.png" in capsys.readouterr().out

    def test_bad_input_is_refused_in_one_line(self, monkeypatch, capsys):
        assert main(monkeypatch, "rank-collapse", "seeds=x") != 0
        assert main(monkeypatch, "rank-collapse", "experiment=rank_colapse") != 0
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert "did you mean rank_collapse?" in lines[1]


class TestCurves:
    def test_draws_runs(self, monkeypatch, tmp_path):
        line = (
            '{"kind": "round", "bytes_down": 1, "bytes_up": 1, "metrics": {"test/accuracy": 0.5}}'
        )
        (tmp_path / "metrics.jsonl").write_text(f"{line}\n{line}\n")
        assert main(monkeypatch, "curves", tmp_path, "--output", tmp_path / "a" / "c.png") == 0
        assert (tmp_path / "a" / "c.png").read_bytes().startswith(b"\x89PNG")

    def test_a_folder_without_a_run(self, monkeypatch, tmp_path, capsys):
        assert main(monkeypatch, "curves", tmp_path) != 0
        said = capsys.readouterr().err
        assert "no readable metrics.jsonl" in said
        assert len(said.splitlines()) == 1


class TestCurvesOfTwo:
    """Two runs beside each other: named, scored, and of one metric."""

    @pytest.fixture
    def pair(self, tmp_path):
        for name, metric, values in (("a", "accuracy", (0.1, 0.5)), ("b", "accuracy", (0.1, 0.4))):
            make_run(tmp_path / name, name=f"run {name}", metric=metric, values=values)
        return tmp_path

    def test_are_told_apart_by_name_with_their_scores(self, pair, monkeypatch, capsys):
        figure = pair / "c.png"
        assert main(monkeypatch, "curves", pair / "a", pair / "b", "--output", figure) == 0

        rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert "run a 1 50.0% 50.0% 3.0" in rows
        assert "run b 1 40.0% 40.0% 3.0" in rows
        assert figure.stat().st_size > 0

    def test_one_name_of_both_tells_nothing(self, pair, monkeypatch, capsys):
        make_run(pair / "c", name="run a", metric="accuracy", values=(0.1, 0.3))
        main(monkeypatch, "curves", pair / "a", pair / "c", "--output", pair / "c.png")

        assert "run a" not in capsys.readouterr().out

    def test_of_two_metrics_are_refused(self, pair, monkeypatch, capsys):
        make_run(pair / "p", name="p", metric="perplexity", values=(90.0, 30.0))
        code = main(monkeypatch, "curves", pair / "a", pair / "p", "--output", pair / "c.png")

        assert code == 2
        assert "runs with different metrics: accuracy, perplexity" in capsys.readouterr().err
        assert not (pair / "c.png").exists()


def make_run(folder, *, name, metric, values):
    folder.mkdir()
    rounds = [
        {"kind": "round", "server_round": number, "seconds": 1.0, "train_loss": 1.0,
         "bytes_down": 10**6 * (2 * number), "bytes_up": 10**6 * number, "replies": 1,
         "failures": 0, "metrics": {f"test/{metric}": value}}
        for number, value in enumerate(values)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    summary = {"status": "finished", "name": name, "dataset": {}, "final": rounds[-1]["metrics"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("{}")
