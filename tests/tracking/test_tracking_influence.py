"""Influence by rank: the means over rounds, the figure, and the command that draws it."""

import json
from dataclasses import replace

import pytest
from conftest import ROUND
from matplotlib import image

from hafl_app.commands.plots import influence
from hafl_app.tracking.influence import by_rank, draw_influence, influence_of_run

RANKS = (2, 2, 8)


def record(server_round, shares, ranks=RANKS):
    entries = [
        {"partition_id": k, "rank": rank, "influence": share, "examples": 0.3, "components": 0.1}
        for k, (rank, share) in enumerate(zip(ranks, shares, strict=True))
    ]
    return replace(ROUND, server_round=server_round, influence=entries)


ROUNDS = [replace(ROUND, server_round=0), record(1, (0.1, 0.2, 0.7)), record(2, (0.3, 0.4, 0.3))]


def test_sums_the_clients_of_a_rank_and_averages_rounds():
    low, high = by_rank(ROUNDS)
    assert (low.rank, low.clients, high.rank, high.clients) == (2, 2, 8, 1)
    assert (low.influence, low.lowest, low.highest) == pytest.approx((0.5, 0.3, 0.7))
    assert (low.examples, low.components) == pytest.approx((0.6, 0.2))
    assert (high.influence, high.lowest, high.highest) == pytest.approx((0.5, 0.3, 0.7))
    assert by_rank(ROUNDS[:1]) == []


def test_the_figure_has_a_bar_for_every_rank_and_share(tmp_path):
    assert draw_influence(ROUNDS, tmp_path / "a" / "i.png", "A run, 10 $ and all")
    assert image.imread(tmp_path / "a" / "i.png").std() > 0.01
    one_rank = [record(1, (0.5, 0.25, 0.25), ranks=(4, 4, 4))]
    assert not draw_influence(one_rank, tmp_path / "none.png", "")
    assert not (tmp_path / "none.png").exists()


def written(folder, rounds):
    lines = [json.dumps({"kind": "round", **vars(one), "train_loss": 0.1}) for one in rounds]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_the_command_draws_a_run(tmp_path, capsys):
    run, output = written(tmp_path / "run", ROUNDS), tmp_path / "out.png"
    assert [one.server_round for one in influence_of_run(run)] == [1, 2]
    assert influence(run, output) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "Written: " in capsys.readouterr().out


def test_the_command_says_what_is_missing(tmp_path, capsys):
    assert influence(tmp_path, tmp_path / "out.png") != 0
    assert influence(written(tmp_path / "run", ROUNDS[:1]), tmp_path / "out.png") != 0
    one_rank = [record(1, (0.5, 0.25, 0.25), ranks=(4, 4, 4))]
    assert influence(written(tmp_path / "one", one_rank), tmp_path / "out.png") != 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "no readable metrics.jsonl" in lines[0]
    assert "no round has a record of influence" in lines[1]
    assert "of one rank" in lines[2]
    assert not (tmp_path / "out.png").exists()
