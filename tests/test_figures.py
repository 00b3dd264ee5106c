"""Figures of comparisons: names of cells and methods are drawn as they are."""

import pytest

from hafl_app.experiments.figures import Line, draw_comparison, draw_shares
from hafl_app.experiments.results import Curve


@pytest.mark.parametrize("name", ["$x_$", "$\\frac{$", "a $ b", "a\nb"])
def test_no_name_is_a_formula(name, tmp_path):
    curve = Curve((0.1, 0.4), (0.2, 0.3), (0, 5), (0, 3))

    draw_comparison({name: {name: [curve]}}, tmp_path / "a.png", name)
    draw_shares({name: Line([1, 2], [[0.1, 0.2]])}, tmp_path / "b.png", name, "share")

    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "b.png").stat().st_size > 1000
