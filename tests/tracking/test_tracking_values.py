"""What external trackers log of a run."""

import math

from hafl_app.printable import without_credentials
from hafl_app.tracking.base import ClientRow
from hafl_app.tracking.mlflow import absolute_uri
from hafl_app.tracking.values import flat, round_values, run_config, summary_values


def test_what_is_no_number_is_left_out(round_record):
    values = round_values(round_record(train_loss=math.nan, metrics={"test/loss": math.inf}))
    assert {"train/loss", "test/loss"}.isdisjoint(values)
    assert values["round/replies"] == 3.0


def test_the_key_of_the_noise_stays_here():
    settings = {"seed": 3, "privacy": {"kind": "central_dp", "noise_seed": 7}}
    config = run_config(settings, [ClientRow(0, 11, 2, 30, "cpu")])
    assert config["privacy"] == {"kind": "central_dp"}
    assert config["clients"] == [{"partition_id": 0, "rank": 2, "examples": 30, "device": "cpu"}]
    assert settings["privacy"]["noise_seed"] == 7


def test_the_last_and_the_best_round_are_told_apart():
    summary = {"final": {"a": 1}, "best_clients": {"round": 2, "chosen_by": "x", "a": 3}}
    assert summary_values(summary) == {"final/a": 1.0, "best/round": 2.0, "best/a": 3.0}


def test_nested_settings_are_named_in_full():
    assert flat({"a": 1, "b": {"c": {"d": [2]}}}) == {"a": 1, "b.c.d": [2]}


def test_credentials_are_taken_out_of_addresses_alone():
    text = "x https://me:pw@host/a and mail me@host, sqlite:///a@b.db"
    assert without_credentials(text) == "x https://host/a and mail me@host, sqlite:///a@b.db"


def test_a_local_store_does_not_move_with_the_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert absolute_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:///x/y.db") == f"sqlite:///{tmp_path}/x/y.db"
    assert absolute_uri("http://host:5000") == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pw@host")
    assert absolute_uri(None) is None  # the processes of the run read the same environment
