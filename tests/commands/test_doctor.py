"""`hafl doctor`: its exit codes and lines, and the estimate of a run."""

import pytest
from rich.cells import cell_len
from running import TINY

from hafl_app.commands import doctor
from hafl_app.commands.main import main
from hafl_app.config.compose import compose
from hafl_app.engines import estimate as estimates
from hafl_app.engines.estimate import Costs, Estimate, advice, clients_at_once, estimate, seconds_of
from hafl_app.run.environment import BROKEN, FINE, NOTE, Finding
from hafl_app.run.workload import Step
from hafl_app.tracking.as_text import WIDTH

INPROCESS = [*TINY, "engine=inprocess"]


@pytest.fixture
def machine(monkeypatch):
    """Replace what the checks find."""

    def of(*findings):
        monkeypatch.setattr(doctor, "findings", lambda settings: iter(findings))

    of(Finding("Python", FINE, "3.11"))
    return of


class TestExit:
    def test_all_is_well(self, machine, capsys):
        assert main(["doctor"]) == 0
        assert capsys.readouterr().out == "ok      Python: 3.11\nall that is needed\n"

    def test_what_is_worth_knowing_is_no_failure(self, machine, capsys):
        machine(Finding("Ports", NOTE, "9093 is taken", "use another"))
        assert main(["doctor"]) == 0
        assert "note    Ports: 9093 is taken\n        -> use another\n" in capsys.readouterr().out

    def test_what_is_broken_is_one(self, machine, capsys):
        machine(Finding("Disk", BROKEN, "full"), Finding("Python", FINE, "3.11"))
        assert main(["doctor"]) == 1
        assert capsys.readouterr().out.startswith("broken  Disk: full\nok      Python")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["rounds=3"], "federation.num_rounds"),
            (["-m", "seed=1"], "-m: expected settings alone"),
            (["seed=1,2"], "seed"),
        ],
    )
    def test_a_mistake_is_one_line(self, machine, arguments, words, capsys):
        assert main(["doctor", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1

    def test_settings_that_a_run_would_refuse(self, machine, capsys):
        settings = [*INPROCESS, "strategy=zero_padding", "privacy.kind=central_dp"]
        assert main(["doctor", *settings]) == 2
        assert "broken  Settings: federation.max_norm_ratio=10.0" in capsys.readouterr().out

    def test_lines_fit_80_columns(self, machine, capsys):
        machine(*(Finding("Memory", level, "word " * 60) for level in (FINE, NOTE, BROKEN)))
        main(["doctor"])
        assert max(map(cell_len, capsys.readouterr().out.splitlines())) <= WIDTH

    def test_a_run_is_checked_measured_and_advised_on(self, machine, capsys):
        alone = "federation.alone_clients_per_rank=1"
        assert main(["doctor", *INPROCESS, alone]) == 0
        lines = capsys.readouterr().out
        for words in ("ok      Settings: go", "5 clients, 1 at a time (inprocess)", "Time: about"):
            assert words in lines


class TestAtOnce:
    @pytest.mark.parametrize(
        ("overrides", "cpus", "expected"),
        [
            (["engine=inprocess"], 8, 1),
            (["engine=ray"], 4, 4),
            (["engine=ray"], 64, 5),  # as many as there are clients
            (["engine=ray", "client.num_threads=2"], 8, 4),
            (["engine=ray", "federation.client_cpus=8"], 8, 1),
        ],
    )
    def test_clients(self, monkeypatch, overrides, cpus, expected):
        monkeypatch.setattr("hafl_app.engines.flower_run.usable_cpus", lambda: cpus)
        monkeypatch.setattr(estimates, "usable_cpus", lambda: cpus)
        settings = compose([*TINY, "client.device=cpu", *overrides])

        assert clients_at_once(settings) == expected


class TestSeconds:
    STEPS = (
        Step("score", 0, 10),
        Step("train", 1, 60, 30),
        Step("evaluate", 1, 8, 2),
        Step("train", 2, 60, 30),
        Step("alone", 3, 90, 80),
    )

    @pytest.mark.parametrize(
        ("at_once", "expected"),
        [
            (1, {"score": 10.0, "train": 240.0, "evaluate": 8.0, "alone": 180.0}),
            (2, {"score": 10.0, "train": 120.0, "evaluate": 4.0, "alone": 160.0}),
            # no round is shorter than its longest client
            (8, {"score": 10.0, "train": 120.0, "evaluate": 2.0, "alone": 160.0}),
        ],
    )
    def test_are_texts_times_what_one_costs(self, at_once, expected):
        assert seconds_of(self.STEPS, Costs(trained=2.0, scored=1.0), at_once) == expected


class TestEstimate:
    def test_costs_are_measured_on_the_runs_own_clients(self):
        found = estimate(compose(INPROCESS))

        assert (found.clients, found.at_once, found.lone) == (5, 1, 0)
        assert {"start", "train", "score", "evaluate", "finish"} <= found.seconds.keys()
        assert all(seconds > 0 for seconds in found.seconds.values())
        assert 0 < found.needed_mb < found.usable_mb

    def advice_for(self, *overrides, **changes):
        fields = {"at_once": 4, "needed_mb": 10.0, "usable_mb": 100.0, "clients": 5, "lone": 3,
                  "seconds": {"start": 1.0, "train": 100.0}}  # fmt: skip
        return "\n".join(advice(compose([*TINY, *overrides]), Estimate(**{**fields, **changes})))

    @pytest.mark.parametrize(
        ("overrides", "changes", "words"),
        [
            ([], {"needed_mb": 200.0}, "federation.client_cpus="),
            ([], {"needed_mb": 200.0}, "client.micro_batch_size=8"),
            ([], {"needed_mb": 200.0, "at_once": 1}, "client.gradient_checkpointing=true"),
            ([], {"seconds": {"start": 1.0, "train": 70.0, "alone": 30.0}}, "3 clients that train"),
            (
                ["federation.test_every=1"],
                {"seconds": {"start": 1.0, "train": 50.0, "score": 50.0}},
                "federation.test_every=0",
            ),
            ([], {"seconds": {"start": 1.0, "score": 50.0}}, "federation.evaluate_every=2"),
            (["engine=ray"], {"seconds": {"start": 25.0, "train": 5.0}}, "engine=inprocess"),
        ],
    )
    def test_what_to_change(self, overrides, changes, words):
        assert words in self.advice_for(*overrides, **changes)

    def test_nothing_is_changed_where_all_is_well(self):
        assert self.advice_for() == ""
