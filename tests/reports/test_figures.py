"""Figures: readable in gray, percent alike, and the numbers that they show."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from written_runs import RANKS, write_adapter, write_run

from hafl_app.metrics import ACCURACY
from hafl_app.reports.client_scores import ranks_trained, worst_tenth
from hafl_app.reports.curve import Curve
from hafl_app.reports.figures import style
from hafl_app.reports.figures.clients import bytes_by_client, influence_by_rank, scores_by_rank
from hafl_app.reports.figures.curves import Line, draw_lines, row_of
from hafl_app.reports.figures.heat_maps import importance_over_rounds, importance_shares
from hafl_app.reports.plots import KINDS, figure_of_runs
from hafl_app.reports.runs import labels_frame, read_run
from hafl_app.reports.spectra import read_energy


def gray(color):
    return float(np.dot(to_rgb(color), (0.299, 0.587, 0.114)))


class TestStyle:
    def test_lines_of_a_figure_differ_without_color(self):
        axes = Figure().subplots()
        names = [f"m{i}" for i in range(5 * len(style.COLORS))]
        draw_lines(axes, {n: Line([0, 1], [[0.1, 0.2]]) for n in names}, names, ACCURACY)
        looks = {(line.get_marker(), str(line.get_linestyle())) for line in axes.lines}
        dashed = {(line.get_marker(), str(line._dash_pattern)) for line in axes.lines}
        assert len(looks | dashed) >= len(names)
        assert len(dashed) == len(names)

    def test_no_two_lines_share_color_and_marker(self):
        axes = Figure().subplots()
        names = [f"m{i}" for i in range(36)]
        draw_lines(axes, {n: Line([0, 1], [[0.1, 0.2]]) for n in names}, names, ACCURACY)
        assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == len(names)

    def test_heat_goes_from_dark_to_light(self):
        shades = [gray(colormaps[style.HEAT](x)) for x in np.linspace(0, 1, 20)]
        assert shades == sorted(shades)
        assert shades[-1] - shades[0] > 0.6

    @pytest.mark.parametrize(
        ("share", "text"),
        [(0, "0%"), (0.2, "20%"), (0.025, "2.5%"), (1e-6, "0.0001%"), (1, "100%")],
    )
    def test_percent(self, share, text):
        assert style.percent_text(share) == text

    @pytest.mark.parametrize("suffix", style.FORMATS)
    def test_files_hold_no_date_and_no_address(self, suffix, tmp_path):
        paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for path in paths:
            style.save(scores_by_rank({"run": scores()}, ACCURACY, "title"), path)
        first, second = (path.read_bytes() for path in paths)
        assert first == second
        assert b"matplotlib.org" not in first

    def test_another_suffix_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"a.gif: expected a name that ends in .png, .svg"):
            style.save(Figure(), tmp_path / "a.gif")

    def test_many_names_are_thinned(self):
        assert style.thinned(range(100), 40) == ([*range(0, 100, 3)], [*map(str, range(0, 100, 3))])


def scores(values=(0.2, 0.4, 0.6, 0.8), server_round=2):
    rows = [(server_round, i, RANKS[i], v) for i, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["server_round", "partition_id", "rank", "accuracy"])


class TestClients:
    def test_the_last_scores_stand_over_their_rank_and_the_worst_is_marked(self):
        both = pd.concat([scores((0.9, 0.9, 0.9, 0.9), 1), scores()])
        axes = scores_by_rank({"run": both}, ACCURACY, "").axes[0]
        rest, worst = (c.get_offsets() for c in axes.collections)
        assert worst[:, 1].tolist() == [0.2]
        assert sorted(rest[:, 1].tolist()) == [0.4, 0.6, 0.8]
        assert [round(x) for x in rest[:, 0].tolist()] == [0, 1, 2]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "4", "8"]
        mean, of_worst = (line.get_ydata()[0] for line in axes.lines)
        assert (mean, of_worst) == (pytest.approx(0.5), 0.2)

    def test_a_tenth_of_many(self):
        many = pd.DataFrame({"accuracy": np.linspace(1, 0, 25)})
        assert len(worst_tenth(many, ACCURACY)) == 3
        assert worst_tenth(many, ACCURACY)["accuracy"].max() < 0.1

    def test_ranks_are_means_over_modules_and_failures_do_not_count(self):
        clients = pd.DataFrame(
            {
                "server_round": [1, 1],
                "partition_id": [0, 1],
                "rank": [4, 4],
                "components_trained": [12, 24],
                "error": ["", "out of memory"],
            }
        )
        assert ranks_trained(clients, 6)["rank_trained"].tolist() == [2.0]

    def test_bytes_are_summed_over_rounds(self):
        clients = pd.DataFrame(
            {
                "partition_id": [0, 1, 0, 1],
                "rank": [8, 2, 8, 2],
                "bytes_down": [3e6, 1e6, 3e6, 1e6],
                "bytes_up": [1e6, 0.5e6, 1e6, 0.5e6],
            }
        )
        axes = bytes_by_client({"run": clients}, "").axes[0]
        assert [bar.get_height() for bar in axes.patches] == [2, 6, 1, 2]  # down, then up
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1 (r2)", "0 (r8)"]

    def test_influence_is_summed_over_the_clients_of_a_rank(self):
        columns = ["server_round", "rank", "examples", "components", "influence"]
        rows = [(1, 2, 0.2, 0.1, 0.1), (1, 2, 0.2, 0.1, 0.2), (1, 8, 0.6, 0.8, 0.7)]
        axes = influence_by_rank({"run": pd.DataFrame(rows, columns=columns)}, "").axes[0]
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(
            [0.4, 0.6, 0.2, 0.8, 0.3, 0.7]
        )


class TestHeatMaps:
    def frame(self):
        rows = [
            (1, "norm", "layer.0.query", 1, 3.0),
            (1, "norm", "layer.0.key", 1, 1.0),
            (1, "norm", "layer.0.query", 2, 0.0),
            (1, "norm", "layer.1.query", 1, np.nan),
            (2, "norm", "layer.0.query", 1, 1.0),
            (2, "norm", "layer.1.query", 1, 3.0),
        ]
        columns = ["server_round", "measure", "module", "component", "importance"]
        return pd.DataFrame(rows, columns=columns)

    def test_shares_of_a_round_add_up_over_layers_and_components(self):
        shares = importance_shares(self.frame())
        by_place = shares.set_index(["server_round", "layer", "component"])["share"]
        assert by_place[1, "0", 1] == 1.0  # both modules of the layer
        assert by_place[1, "0", 2] == 0.0
        assert np.isnan(by_place[1, "1", 1])  # not measured is not 0
        assert (by_place[2, "0", 1], by_place[2, "1", 1]) == (0.25, 0.75)

    def test_a_panel_a_layer(self):
        figure = importance_over_rounds(self.frame(), "run")
        titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
        assert titles == ["layer 0", "layer 1"]

    def test_of_many_layers_some_are_drawn_and_it_is_said(self):
        rows = [(1, "norm", f"layers.{layer}.q", 1, 1.0) for layer in range(32)]
        columns = ["server_round", "measure", "module", "component", "importance"]
        figure = importance_over_rounds(pd.DataFrame(rows, columns=columns), "run")
        assert figure.get_suptitle() == "run (11 of 32 layers)"

    def test_classes_that_a_client_lacks_are_zero(self):
        clients = [{"labels": {"b": 3}}, {"labels": {"a": 1, "b": 2}}]
        frame = labels_frame({"label_names": ["a", "b"], "clients": clients})
        assert frame.to_numpy().tolist() == [[0, 1], [3, 2]]


class TestEnergy:
    def test_shares_of_the_squared_norm(self, tmp_path):
        run = write_run(tmp_path / "run")
        write_adapter(run, (3.0, 2.0, 1.0))
        energy = read_energy(run)
        assert energy["energy"].tolist() == pytest.approx([9 / 14, 4 / 14, 1 / 14])
        assert set(energy["module"]) == {"base_model.model.layer.0.query"}

    def test_without_an_adapter_there_is_none(self, tmp_path):
        assert read_energy(write_run(tmp_path / "run")).empty


class TestCurves:
    def curve(self, test, validation, simulated=()):
        nothing = (0,) * len(test)
        return Curve(test, validation, nothing, nothing, simulated=simulated)

    def test_validation_is_drawn_where_test_scores_are_few(self):
        unknown = float("nan")
        sparse = self.curve((unknown, unknown, 0.5), (0.1, 0.2, 0.3))
        row = row_of("", {"m": [sparse]})
        assert row.ylabel == "validation accuracy"
        assert row_of("", {"m": [self.curve((0.1, 0.2), (0.1, 0.2))]}).ylabel == "test accuracy"

    def test_simulated_time_is_a_panel_where_all_seeds_have_it(self):
        scored = (0.1, 0.2)
        with_time = self.curve(scored, scored, (0.0, 7.0))
        assert len(row_of("", {"m": [with_time]}).panels) == 3
        assert len(row_of("", {"m": [with_time, self.curve(scored, scored)]}).panels) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_of_a_run_is_drawn(kind, tmp_path):
    run = write_run(tmp_path / "run", influence=True)
    write_adapter(run, (2.0, 1.0))
    path = tmp_path / "figure.png"
    style.save(figure_of_runs(kind, [run]), path)
    assert path.stat().st_size > 5000


def test_a_figure_of_what_a_run_lacks_is_refused_in_one_line(tmp_path):
    run = write_run(tmp_path / "run", clients=())
    with pytest.raises(ValueError, match=r"federation\.fraction_evaluate"):
        figure_of_runs("clients", [run])
    with pytest.raises(ValueError, match="no adapter was saved"):
        figure_of_runs("energy", [run])
    with pytest.raises(ValueError, match="expected one run, got 2"):
        figure_of_runs("labels", [run, write_run(tmp_path / "other")])


def test_influence_is_read_where_rounds_have_it(tmp_path):
    assert read_run(write_run(tmp_path / "without")).influence.empty
    run = read_run(write_run(tmp_path / "run", influence=True))
    assert run.influence["influence"].tolist() == [0.25] * len(RANKS)
    assert "influence" not in run.rounds
