"""TensorBoard, MLflow and trackio, each read back from a real local store by its own reader."""

import importlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from hafl_app.tracking.base import INTERRUPTED, History, Trackers
from hafl_app.tracking.external import TrackedRun, external_trackers
from hafl_app.tracking.settings import TrackingSettings

RUN_ID = "5eed" * 8
SETTINGS = {"seed": 3, "lora": {"max_rank": 16}, "privacy": {"kind": "none", "noise_seed": 424242}}
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny", "trackio": "trackio"}
SUMMARY = {
    "final": {"test/accuracy": 0.7},
    "best_validation": {"round": 1, "chosen_by": "accuracy", "test/accuracy": 0.75},
}


@dataclass
class Store:
    """A tracker and the store it writes to."""

    name: str
    folder: Path

    def tracker(self):
        """Return a tracker as a run makes it; every call one of the same run."""
        settings = TrackingSettings(uri=f"sqlite:///{self.folder / 'mlflow.db'}")
        setattr(settings, self.name, True)
        (tracker,) = external_trackers(settings, TrackedRun(self.folder / "run", RUN_ID, "run"))
        return tracker

    def read(self):
        """Return the values by name and step, the config as text, and the status."""
        return getattr(self, f"_read_{self.name}")()

    def _read_tensorboard(self):
        module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
        events = module.EventAccumulator(
            str(self.folder / "run" / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}
        )
        events.Reload()
        tags = events.Tags()
        values = {
            name: [(event.step, event.value) for event in events.Scalars(name)]
            for name in tags["scalars"]
        }
        text = {
            name: events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
            for name in tags["tensors"]
        }
        status = text.get("status/text_summary", "running").partition(":")[0]
        return values, text["settings/text_summary"], status

    def _read_mlflow(self):
        client = importlib.import_module("mlflow").MlflowClient(
            f"sqlite:///{self.folder / 'mlflow.db'}"
        )
        experiment = client.get_experiment_by_name("hafl")
        (run,) = client.search_runs([experiment.experiment_id])
        values = {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        return values, json.dumps(run.data.params), run.info.status

    def _read_trackio(self):
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        (name,) = storage.get_runs("hafl")
        values = {}
        for line in storage.get_logs("hafl", name):
            for key, value in line.items():
                if key not in ("step", "timestamp"):
                    values.setdefault(key, []).append((line["step"], value))
        status = next((k.partition("/")[2] for k in values if k.startswith("run/")), "finished")
        return values, json.dumps(storage.get_run_config("hafl", name)), status


@pytest.fixture(params=PACKAGES)
def store(request, tmp_path, monkeypatch):
    if not importlib.util.find_spec(request.param):
        pytest.skip(f"needs {PACKAGES[request.param]}")
    if request.param == "trackio":
        _trackio_in(tmp_path / "trackio", monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open-sesame")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody_may_see")
    return Store(request.param, tmp_path)


def _trackio_in(folder, monkeypatch):
    """Set the folder that trackio reads from its environment when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    importlib.import_module("trackio.utils")
    for name, module in list(importlib.sys.modules.items()):
        if name.startswith("trackio") and getattr(module, "TRACKIO_DIR", None) is not None:
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    assert folder == importlib.import_module("trackio.utils").TRACKIO_DIR


def rounds(round_record, *numbers):
    return [round_record(server_round=number, seconds=1.0 + number) for number in numbers]


def test_what_a_run_logs_is_read_back(store, round_record, client_record, client_rows):
    tracker = store.tracker()
    tracker.start(SETTINGS, client_rows)
    for record in rounds(round_record, 0, 1, 2):
        if record.server_round:
            tracker.log_client(client_record(server_round=record.server_round))
        tracker.log_round(record)
    tracker.finish(SUMMARY)

    values, config, status = store.read()

    assert status.lower() == "finished"
    assert [step for step, _ in values["validation/accuracy"]] == [0, 1, 2]
    assert values["validation/accuracy"][1][1] == pytest.approx(0.512)
    assert [value for _, value in values["round/seconds"]] == [1.0, 2.0, 3.0]
    assert [step for step, _ in values["client/7/loss"]] == [1, 2]
    assert values["client/7/bytes-up"][0][1] == 120_000
    assert values["final/test/accuracy"][0][1] == pytest.approx(0.7)
    assert values["best/test/accuracy"][0][1] == pytest.approx(0.75)
    assert "max_rank" in config
    assert "cuda:1" in config


def test_a_run_that_goes_on_is_the_same_run(store, round_record, client_rows):
    first = store.tracker()
    first.start(SETTINGS, client_rows)
    for record in rounds(round_record, 0, 1, 2):
        first.log_round(record)
    first.fail("interrupted", INTERRUPTED)
    again = store.tracker()
    again.start(SETTINGS, client_rows, History(rounds(round_record, 0, 1)))
    for record in rounds(round_record, 2, 3):  # the second was not in a checkpoint
        again.log_round(record)
    again.finish(SUMMARY)

    values, _, _ = store.read()  # of the only run

    assert values["round/seconds"] == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]


def test_one_that_is_switched_on_later_has_the_rounds_before(
    store, round_record, client_record, client_rows
):
    tracker = store.tracker()
    history = History(rounds(round_record, 0, 1), [client_record(server_round=1)])
    tracker.start(SETTINGS, client_rows, history)
    tracker.log_round(*rounds(round_record, 2))
    tracker.finish({})

    values, _, _ = store.read()

    assert [step for step, _ in values["round/seconds"]] == [0, 1, 2]
    assert [step for step, _ in values["client/7/loss"]] == [1]


def test_a_failed_run_is_called_so(store, round_record, client_rows):
    tracker = store.tracker()
    tracker.start(SETTINGS, client_rows)
    tracker.log_round(round_record(server_round=0, train_loss=math.nan))
    tracker.fail("OSError: the disk of https://me:open-sesame@host is full")

    values, _, status = store.read()

    assert status.lower() == "failed"
    assert "train/loss" not in values  # no number


def test_no_secret_is_in_the_store(store, round_record, client_rows):
    tracker = store.tracker()
    tracker.start(SETTINGS, client_rows)
    tracker.log_round(round_record())
    tracker.fail("no answer from https://me:open-sesame@host")

    files = [path for path in store.folder.rglob("*") if path.is_file()]
    kept = b"".join(path.read_bytes() for path in files)

    assert b"max_rank" in kept
    for secret in (b"open-sesame", b"k" * 40, b"hf_nobody_may_see", b"424242"):
        assert secret not in kept


def test_a_store_that_breaks_ends_no_run(store, round_record, client_rows, caplog):
    trackers = Trackers([], [store.tracker()])
    trackers.start(SETTINGS, client_rows)
    (external,) = trackers._external
    external._write = _broken

    for record in rounds(round_record, 0, 1):
        trackers.log_round(record)
    trackers.finish(SUMMARY)

    (warning,) = (r.getMessage() for r in caplog.records if r.name.startswith("hafl_app"))
    assert re.search("Tracker failed and is disabled.*host is gone", warning)
    assert "open-sesame" not in caplog.text


def _broken(values, step):
    raise ConnectionError("https://me:open-sesame@host is gone")


def test_before_the_start_is_refused(store, round_record):
    with pytest.raises(RuntimeError, match="before start"):
        store.tracker().log_round(round_record())


def test_a_new_run_replaces_the_event_files_of_an_earlier_one(store, round_record, client_rows):
    if store.name != "tensorboard":
        pytest.skip("other stores keep runs apart")
    for numbers in ((0, 1, 2), (0, 1)):
        tracker = store.tracker()
        tracker.start(SETTINGS, client_rows)
        for record in rounds(round_record, *numbers):
            tracker.log_round(record)
        tracker.finish({})

    assert [step for step, _ in store.read()[0]["round/seconds"]] == [0, 1]
