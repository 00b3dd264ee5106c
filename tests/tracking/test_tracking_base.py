import logging

import pytest

from hafl_app.tracking.base import Trackers, TrackingError


class Recorder:
    """Tracker that notes its calls, and raises `error` in the call named `fails_in`."""

    def __init__(self, fails_in="", error=None):
        self.calls = []
        self._fails_in = fails_in
        self._error = error or ConnectionError("the network is gone")

    def _note(self, name, *values):
        self.calls.append((name, *values))
        if name == self._fails_in:
            raise self._error

    def start(self, settings, clients, history):
        self._note("start", settings, clients)

    def log_round(self, record):
        self._note("log_round", record)

    def log_client(self, record):
        self._note("log_client", record)

    def finish(self, summary):
        self._note("finish", summary)

    def fail(self, reason, status="failed"):
        self._note("fail", reason)


class TestTrackers:
    def test_tells_every_tracker_everything(self, round_record, client_record, client_rows):
        recorders = [Recorder(), Recorder()]
        trackers = Trackers(recorders[:1], recorders[1:])

        trackers.start({"seed": 3}, client_rows)
        trackers.log_client(client_record())
        trackers.log_round(round_record())
        trackers.finish({"x": 1})
        trackers.fail("late")

        expected = [
            ("start", {"seed": 3}, client_rows),
            ("log_client", client_record()),
            ("log_round", round_record()),
            ("finish", {"x": 1}),
            ("fail", "late"),
        ]
        assert [recorder.calls for recorder in recorders] == [expected, expected]

    def test_failing_external_tracker_is_logged_once_and_dropped(self, round_record, caplog):
        required, failing, other = Recorder(), Recorder("log_round"), Recorder()
        trackers = Trackers([required], [failing, other])

        with caplog.at_level(logging.WARNING):
            for server_round in (1, 2, 3):
                trackers.log_round(round_record(server_round=server_round))

        assert len(failing.calls) == 1
        assert len(required.calls) == len(other.calls) == 3
        (message,) = caplog.messages
        assert "Recorder" in message
        assert "ConnectionError: the network is gone" in message

    def test_failing_required_tracker_raises_after_the_others_heard(self, round_record):
        other, external = Recorder(), Recorder()
        full = Recorder("log_round", OSError(28, "No space left on device"))
        trackers = Trackers([full, other], [external])

        with pytest.raises(OSError, match="No space left"):
            trackers.log_round(round_record())

        assert len(other.calls) == len(external.calls) == 1

    def test_wrong_settings_raise_from_an_external_tracker_too(self, client_rows):
        trackers = Trackers([], [Recorder("start", TrackingError("no key"))])

        with pytest.raises(TrackingError, match="no key"):
            trackers.start({}, client_rows)
