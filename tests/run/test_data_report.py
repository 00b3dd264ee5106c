"""The data of a run are printed before it trains, in 80 columns, and kept in its folder."""

import json

import pytest
from running import TINY, run_tiny

from hafl_app.config.compose import SettingsError, compose
from hafl_app.data.account import ClientRows, DataAccount
from hafl_app.run.data_report import data_lines
from hafl_app.run.preflight import check
from hafl_app.tracking.as_text import WIDTH


def account(clients, names, **changes):
    """Make up an account in which client i has i + 1 rows of the first class, 1 of the last."""
    parts = tuple(ClientRows(i + 2, 1, {names[0]: i + 1, names[-1]: 1}) for i in range(clients))
    labels = dict.fromkeys(names, 0) | {names[0]: clients * (clients + 1) // 2, names[-1]: clients}
    return DataAccount(tuple(names), {}, {}, 7, 5, labels, parts, **changes)


class TestLines:
    def test_few_clients_with_few_classes_have_a_column_a_class(self):
        assert data_lines(account(2, ["ham", "spam"])) == [
            "Data",
            "  training           5 rows on 2 clients, 2 held out",
            "  validation         7 rows",
            "  test               5 rows",
            "  classes            2: 2 (spam) to 3 (ham) rows",
            "Training rows by class and client",
            "  client  rows  ham  spam",
            "       0     2    1     1",
            "       1     3    2     1",
        ]

    def test_many_classes_are_summed_up(self):
        names = [f"class {i}" for i in range(77)]
        lines = data_lines(account(3, names))

        assert lines[4] == "  classes           77: 3 (class 76) to 6 (class 0) rows"
        assert lines[5] == "  unused            75 classes without a training row"
        assert lines[-1].split() == ["2", "4", "2", "class", "0", "75%"]

    def test_many_clients_are_summed_up(self):
        lines = data_lines(account(101, ["ham", "spam"]))

        assert [line.split() for line in lines[-4:]] == [
            ["each", "client", "min", "median", "max"],
            ["rows", "2", "52", "102"],
            ["classes", "2", "2", "2"],
            ["largest", "class", "50%", "98%", "99%"],
        ]

    @pytest.mark.parametrize("clients", [1, 20, 1000])
    @pytest.mark.parametrize("classes", [2, 5, 6, 9000])
    def test_fit_in_a_terminal(self, clients, classes):
        names = [f"{i}{'long name ' * 15}\x1b[2J" for i in range(classes)]
        lines = data_lines(account(clients, names, notes=("note",)))

        assert max(map(len, lines)) <= WIDTH
        assert len(lines) < 30
        assert all(line.isprintable() for line in lines)


class TestRun:
    def test_prints_and_keeps_them_before_it_trains(self, tmp_path, capsys):
        run_tiny(tmp_path / "out")

        printed = capsys.readouterr().out
        assert printed.index("Training rows by class and client") < printed.index("round 0/")
        kept = json.loads((tmp_path / "out" / "data.json").read_text())
        assert sum(client["train"] for client in kept["clients"]) == sum(kept["labels"].values())
        assert len(kept["label_names"]) == 20


class TestRefusals:
    def test_unseen_clients_without_rows_to_score(self):
        asked = [*TINY, "federation.unseen_clients=1"]
        check(compose(asked))
        with pytest.raises(SettingsError, match=r"unseen_clients=1: .*holdout_fraction above 0"):
            check(compose([*asked, "dataset.holdout_fraction=0"]))

    def test_settings_of_the_data(self):
        with pytest.raises(SettingsError, match=r"no dataset\.answer_column to learn"):
            check(compose([*TINY, "dataset.template='{text}'"]))
