"""Figures of comparisons: names of cells and methods are drawn as they are."""

import math

import pytest
from matplotlib.figure import Figure

from hafl_app.metrics import ACCURACY
from hafl_app.reports.curve import Curve
from hafl_app.reports.figures.curves import Line, draw_comparison, draw_lines, draw_shares


@pytest.mark.parametrize("name", ["$x_$", "$\\frac{$", "a $ b", "a\nb"])
def test_no_name_is_a_formula(name, tmp_path):
    curve = Curve((0.1, 0.4), (0.2, 0.3), (0, 5), (0, 3))

    draw_comparison({name: {name: [curve]}}, tmp_path / "a.png", name)
    draw_shares({name: Line([1, 2], [[0.1, 0.2]])}, tmp_path / "b.png", name, "share")

    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_points_that_a_seed_does_not_know_are_left_out():
    axes = Figure().subplots()
    unknown = math.nan
    seeds = [[unknown, 0.2, unknown, 0.4], [unknown, 0.4, 0.5, 0.8]]

    draw_lines(axes, {"m": Line(range(4), seeds)}, ["m"], ACCURACY)

    (line,) = axes.lines
    assert line.get_xdata().tolist() == [1, 3]
    assert line.get_ydata().tolist() == pytest.approx([0.3, 0.6])
