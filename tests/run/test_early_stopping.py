"""Runs that end when their scores no longer get better."""

import logging
import math

import pytest
from running import records, run_tiny
from safetensors.torch import load_file

from hafl_app.metrics import ACCURACY, PERPLEXITY, Choice
from hafl_app.run.early_stopping import stop_reason
from hafl_app.run.progress import PROGRESS_FILE, Progress
from hafl_app.server.settings import EarlyStoppingSettings
from hafl_app.tracking.base import RoundRecord
from hafl_app.tracking.closing import closing_lines

BY_ACCURACY, BY_PERPLEXITY = Choice(ACCURACY, "validation"), Choice(PERPLEXITY, "validation")


def scored(*values, choice=BY_ACCURACY):
    """Return the records of rounds from 0 with these scores; None was not evaluated."""
    return [
        RoundRecord(number, 1.0, 0.5, 0, 0, 1, 0, {} if value is None else {choice.key: value})
        for number, value in enumerate(values)
    ]


def reason(*values, patience=2, min_delta=0.0, choice=BY_ACCURACY):
    settings = EarlyStoppingSettings(patience, min_delta)
    return stop_reason(scored(*values, choice=choice), choice, settings)


class TestReason:
    def test_names_score_and_setting(self):
        assert reason(0.1, 0.5, 0.5, 0.4) == (
            "validation accuracy has not become better in 2 evaluations "
            "(federation.early_stopping.patience=2)"
        )

    def test_a_gain_begins_the_wait_anew(self):
        assert not reason(0.1, 0.5, 0.4, 0.6, 0.5)
        assert reason(0.1, 0.5, 0.4, 0.6, 0.5, 0.6)

    def test_no_patience_is_no_end(self):
        assert not reason(0.1, 0.5, 0.4, 0.4, 0.4, patience=0)

    def test_the_untrained_model_is_not_what_a_round_must_beat(self):
        assert not reason(0.9, 0.5, 0.6, 0.7)

    def test_small_gains_add_up(self):
        assert reason(0.0, 0.5, 0.504, 0.508, min_delta=0.01).endswith("patience=2)")
        assert "by more than 0.01 in 2 evaluations" in reason(0.0, 0.5, 0.5, 0.5, min_delta=0.01)
        assert not reason(0.0, 0.5, 0.506, 0.512, 0.518, min_delta=0.01)

    def test_a_lower_perplexity_is_a_gain(self):
        assert not reason(90.0, 50.0, 40.0, 30.0, choice=BY_PERPLEXITY)
        assert reason(90.0, 50.0, 55.0, 60.0, choice=BY_PERPLEXITY)

    def test_rounds_without_an_evaluation_are_no_wait(self):
        assert not reason(0.1, 0.5, None, None, 0.4)
        assert reason(0.1, 0.5, None, 0.4, None, 0.4)

    def test_a_score_that_is_no_number_is_no_gain(self):
        assert reason(0.1, 0.5, math.nan, math.nan)
        assert reason(9.0, math.inf, math.inf, choice=BY_PERPLEXITY)

    def test_without_a_choice_of_rounds_there_is_none(self):
        assert not stop_reason(scored(0.1, 0.5, 0.4), None, EarlyStoppingSettings(1))


PLANNED = ("client.learning_rate=1e-12", "federation.num_rounds=6")  # no round is a gain
STOPPING = (*PLANNED, "federation.early_stopping.patience=2", "federation.checkpoint_every=5")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Return the folder of a run that stopped, its summary, and the stages that it went through."""
    folder, seen = tmp_path_factory.mktemp("run") / "out", []
    begin = Progress.begin

    def noting(self, stage, server_round):
        begin(self, stage, server_round)
        seen.append(self.state())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "begin", noting)
        return folder, run_tiny(folder, *STOPPING), seen


@pytest.mark.slow
class TestARun:
    def test_ends_after_so_many_rounds_without_a_gain_and_says_why(self, ended, tmp_path):
        folder, summary, _ = ended
        why = summary["stopped_early"]
        assert [r["server_round"] for r in records(folder, "round")] == [0, 1, 2, 3]
        assert (summary["status"], summary["rounds"]) == ("finished", 3)
        assert (why["round"], why["of"]) == (3, 6)
        assert why["reason"].startswith("validation accuracy has not become better in 2")

    def test_keeps_the_best_round_and_scores_the_last_on_the_test_data(self, ended):
        folder, summary, _ = ended
        assert summary["best_validation"]["round"] <= 3
        assert (folder / "adapter-best" / "adapter_model.safetensors").is_file()
        last = records(folder, "round")[-1]["metrics"]
        assert last["test/accuracy"] == summary["final"]["test/accuracy"]

    def test_has_no_rounds_left_when_it_finishes(self, ended):
        folder, _, seen = ended
        assert seen[-1]["stage"] == "finish"
        assert seen[-1]["rounds"] == 3
        assert not (folder / PROGRESS_FILE).exists()

    def test_goes_on_from_its_last_round_where_its_user_says_so(self, ended, tmp_path, caplog):
        folder, summary, _ = ended
        files = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert files[-1] == "round-00003.safetensors"

        with caplog.at_level(logging.WARNING):
            again = run_tiny(folder, *STOPPING, f"resume={folder}")
        lines = [r.message for r in caplog.records if "no round follows round 3" in r.message]
        assert len(lines) == 1
        assert "(federation.early_stopping.patience=2); a larger one, or 0, goes on" in lines[0]
        assert again["stopped_early"] == summary["stopped_early"]
        assert again["final"] == summary["final"]

        on = run_tiny(folder, *STOPPING, f"resume={folder}", "federation.early_stopping.patience=0")
        assert on["rounds"] == 6
        assert "stopped_early" not in on
        run_tiny(tmp_path / "whole", *PLANNED)
        whole, parts = (
            load_file(path / "adapter" / "adapter_model.safetensors")
            for path in (tmp_path / "whole", folder)
        )
        assert all(tensor.equal(parts[name]) for name, tensor in whole.items())


def test_the_closing_block_says_it():
    entry = {"round": 3, "of": 6, "reason": "accuracy has not become better"}
    assert closing_lines({"stopped_early": entry}) == [
        "ended after round 3 of 6: accuracy has not become better"
    ]
