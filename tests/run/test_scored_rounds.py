"""Which rounds are scored on which data: validation to choose, test at the end or on request."""

import math

import pytest
from running import LONE, TINY, records, run_tiny

from hafl_app.privacy.accounting import central_epsilon
from hafl_app.privacy.mechanism import PrivacyOptions
from hafl_app.reports.curve import read_curve
from hafl_app.run import build, evaluation
from hafl_app.server.options import RunOptions
from hafl_app.server.settings import FederationSettings
from hafl_app.training.adapter_files import load_adapter, read_adapter
from hafl_app.training.evaluate import evaluate

NUM_TEST, NUM_VALIDATION = 40, 16
# Of these the third is best, by more than one validation row.
FOUR = ("federation.num_rounds=4", "client.learning_rate=0.05", "seed=1")


def rounds_with(folder, phase):
    key = f"{phase}/accuracy"
    return [r["server_round"] for r in records(folder, "round") if key in r["metrics"]]


@pytest.fixture
def scored(monkeypatch):
    """The adapters that the server scores, and on how many rows."""
    found = []
    make = evaluation.adapter_evaluator

    def counting(*arguments):
        score = make(*arguments)

        def counted(adapter, examples):
            found.append((adapter, len(examples.labels)))
            return score(adapter, examples)

        return counted

    monkeypatch.setattr(evaluation, "adapter_evaluator", counting)
    return found


def test_without_intervals_the_test_data_are_scored_at_the_end_alone(tmp_path, scored, capsys):
    summary = run_tiny(tmp_path / "out", *FOUR)

    best = summary["best_validation"]
    assert 0 < best["round"] < 4  # not the last: the test means something
    assert rounds_with(tmp_path / "out", "validation") == [0, 1, 2, 3, 4]
    assert rounds_with(tmp_path / "out", "clients") == [1, 2, 3, 4]
    assert rounds_with(tmp_path / "out", "test") == [4]
    sizes = [rows for _, rows in scored]
    assert sizes == [NUM_VALIDATION] * 4 + [NUM_TEST, NUM_VALIDATION, NUM_TEST]

    text = build.federated_text(build.settings_of_run({"overrides": " ".join((*TINY, *FOUR))}), 5)
    scores = evaluate(load_adapter(tmp_path / "out" / "adapter-best").model, text.test)
    assert best["test/loss"] == scores.loss != summary["final"]["test/loss"]
    facts = read_adapter(tmp_path / "out" / "adapter-best").facts
    assert facts["metrics"]["test/loss"] == scores.loss

    curve = read_curve(tmp_path / "out")
    known = [r for r, value in enumerate(curve.test) if math.isfinite(value)]
    assert known == [best["round"], 4]
    assert curve.test[best["round"]] == best["test/accuracy"]
    assert curve.first_round_at(0.0) is None  # which came first is not known

    shown = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in shown if line.startswith("best validation"))
    assert row[3:] == [
        f"{best[key]:.1%}" for key in ("validation/accuracy", "test/accuracy", "test/macro-f1")
    ]


def test_intervals_hold_for_server_and_clients_and_the_last_round_counts(tmp_path, scored):
    every = ("federation.evaluate_every=2", "federation.test_every=3", "federation.num_rounds=5")

    summary = run_tiny(tmp_path / "out", *FOUR, *every)

    assert rounds_with(tmp_path / "out", "validation") == [0, 2, 4, 5]
    assert rounds_with(tmp_path / "out", "clients") == [2, 4, 5]
    assert rounds_with(tmp_path / "out", "test") == [0, 3, 5]
    assert summary["best_validation"]["round"] in {2, 4, 5}


def test_an_adapter_that_is_whole_at_a_rank_is_scored_once(tmp_path, scored):
    summary = run_tiny(tmp_path / "out", LONE, "federation.num_rounds=1")

    # The global adapter, its slices of ranks 2 and 4, and a lone client of ranks 2, 4 and 8.
    assert [rows for _, rows in scored].count(NUM_TEST) == 6
    whole = summary["device_ranks"][-1]
    assert (whole["rank"], whole["federated"]) == (8, summary["final"]["test/accuracy"])


def test_a_resumed_run_scores_the_round_that_was_best_before(tmp_path):
    whole = run_tiny(tmp_path / "whole", *FOUR)
    run_tiny(tmp_path / "parts", *FOUR, "federation.num_rounds=3")
    parts = run_tiny(tmp_path / "parts", *FOUR, f"resume={tmp_path / 'parts'}")

    assert 0 < whole["best_validation"]["round"] <= 3
    assert parts["best_validation"] == whole["best_validation"]


def test_a_run_resumed_to_end_sooner_has_all_scores_of_its_last_round(tmp_path):
    few = (*FOUR, "federation.evaluate_every=4")
    run_tiny(tmp_path / "out", *few, "federation.num_rounds=4", "federation.checkpoint_every=1")
    (tmp_path / "out" / "checkpoints" / "round-00004.safetensors").unlink()

    resumed = run_tiny(
        tmp_path / "out", *few, "federation.num_rounds=3", f"resume={tmp_path / 'out'}"
    )

    assert {"test/accuracy", "validation/accuracy"} <= set(resumed["final"])
    assert math.isfinite(read_curve(tmp_path / "out").test[-1])


def test_the_last_round_within_a_privacy_budget_is_evaluated():
    federation = FederationSettings(num_rounds=10, evaluate_every=4)
    budget = central_epsilon(1.0, 1.0, 6, PrivacyOptions("central_dp").delta)
    privacy = PrivacyOptions("central_dp", noise_multiplier=1.0, max_epsilon=budget)
    options = RunOptions(federation=federation, privacy=privacy)

    assert options.last_round == 6
    assert [r for r in range(7) if options.is_evaluated(r)] == [0, 4, 6]
