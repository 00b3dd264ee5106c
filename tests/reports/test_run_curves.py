import math

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from hafl_app.reports.figures.curves import draw_curves


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw rounds; return the file, and the lines of each panel as {label: (xs, ys)}."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(rounds):
        path = tmp_path / "figures" / "curves.png"
        draw_curves(rounds, path, "flexlora, 3 clients")
        return path, figures[-1]

    return draw


def lines_of(axes):
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("title", ["cost $x", "$x_$", "$ and $", "a\\$b$", "x^$\n_{"])
def test_a_title_is_no_formula(untrained, tmp_path, title):
    draw_curves([untrained], tmp_path / "curves.png", title)


class TestDrawCurves:
    def test_is_a_png_with_something_on_it(self, drawn, untrained, round_record):
        path, _ = drawn([untrained, round_record()])

        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 0.01

    def test_draws_by_round_and_by_traffic(self, drawn, untrained, round_record):
        second = round_record(
            server_round=2,
            bytes_down=1_000_000,
            bytes_up=560_000,
            metrics={"test/accuracy": 0.6, "clients/accuracy": 0.4},
        )

        _, figure = drawn([second, untrained, round_record()])  # the order does not matter

        by_round, by_traffic = figure.axes
        assert lines_of(by_round) == {
            "validation": ([0, 1], [0.25, 0.512]),
            "test": ([0, 1, 2], [0.24, 0.487, 0.6]),
            "clients": ([2], [0.4]),
        }
        # Round 1 sent 12.34 + 4.1 MB, round 2 another 1.56.
        xs, ys = lines_of(by_traffic)["test"]
        assert xs == pytest.approx([0, 16.44, 18.0])
        assert ys == [0.24, 0.487, 0.6]
        assert legend_of(figure) == ["validation", "test", "clients"]

    def test_says_what_it_shows(self, drawn, round_record):
        _, figure = drawn([round_record()])

        by_round, by_traffic = figure.axes
        assert figure.get_suptitle() == "flexlora, 3 clients"
        assert (by_round.get_xlabel(), by_round.get_ylabel()) == ("round", "accuracy")
        assert "MB" in by_traffic.get_xlabel()

    def test_one_round_is_a_visible_point(self, drawn, untrained):
        _, figure = drawn([untrained])

        for axes in figure.axes:
            assert all(line.get_marker() != "None" for line in axes.lines)
            assert list(axes.get_xticks()) == [0]

    def test_gap_in_a_metric_is_left_out(self, drawn, round_record):
        rounds = [round_record(server_round=k) for k in (1, 2, 3)]
        rounds[1] = round_record(server_round=2, metrics={"test/accuracy": math.nan})

        _, figure = drawn(rounds)

        assert lines_of(figure.axes[0])["test"] == ([1, 3], [0.487, 0.487])

    @pytest.mark.parametrize("count", [0, 1])
    def test_without_accuracy_it_says_so(self, drawn, round_record, count):
        _, figure = drawn([round_record(metrics={"test/loss": 1.0})] * count)

        for axes in figure.axes:
            assert [text.get_text() for text in axes.texts] == ["no accuracy was recorded"]

    def test_perplexities_are_no_shares(self, drawn, round_record):
        rounds = [
            round_record(server_round=k, metrics={"test/perplexity": p, "test/loss": 1.0})
            for k, p in ((0, 67.0), (1, 34.0))
        ]

        _, figure = drawn(rounds)

        axes = figure.axes[0]
        assert lines_of(axes)["test"] == ([0, 1], [67.0, 34.0])
        assert axes.get_ylabel() == "perplexity"
        assert not any("%" in label.get_text() for label in axes.get_yticklabels())

    def test_leaves_no_global_state(self, drawn, round_record):
        pyplot = pytest.importorskip("matplotlib.pyplot")

        drawn([round_record()])

        assert pyplot.get_fignums() == []
