"""The run in MLflow, one MLflow run per federation."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hafl_app.printable import printable, without_credentials
from hafl_app.tracking.base import (
    FAILED,
    INTERRUPTED,
    NO_HISTORY,
    ClientRow,
    History,
    TrackingError,
)
from hafl_app.tracking.roundwise import RoundwiseTracker
from hafl_app.tracking.values import flat, run_config, summary_values

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_ENVIRONMENT: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # errors are raised too, and told in one line
    # A server that is gone must not hold up a run: MLflow would try for minutes, every time.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
"""Variables of MLflow, where the user sets none."""

_RUN_TAG: Final = "hafl.run"
_FILE: Final = "sqlite:///"
_DEFAULT: Final = f"{_FILE}mlflow.db"
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100  # that MLflow takes
_LONGEST_VALUE: Final = 500
_LONGEST_REASON: Final = 2000


def absolute_uri(uri: str | None) -> str | None:
    """Return an address of a store that does not depend on the folder of the process.

    None if only ``MLFLOW_TRACKING_URI`` has it, which may carry a password.
    """
    if uri is None and os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    uri = uri or _DEFAULT
    if uri.startswith(_FILE):
        return f"{_FILE}{Path(uri.removeprefix(_FILE)).expanduser().absolute()}"
    return uri


class MlflowTracker(RoundwiseTracker):
    """Log to one MLflow run, with server rounds as its steps.

    Parameters
    ----------
    experiment
        Where the run belongs; made if it does not exist.
    uri
        As in the settings.
    name
        Of the run.
    run_id
        The federation's own id, by which a run that goes on finds its MLflow run.
    """

    def __init__(self, experiment: str, uri: str | None, name: str, run_id: str) -> None:
        super().__init__()
        self._experiment = experiment
        self._uri = uri
        self._name = name
        self._tag = run_id
        self._client: MlflowClient | None = None
        self._mlflow_id = ""

    def start(
        self,
        settings: Mapping[str, Any],
        clients: Sequence[ClientRow],
        history: History = NO_HISTORY,
    ) -> None:
        """Open the run, with the settings as its parameters.

        Raises
        ------
        TrackingError
            When the store cannot be used.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException  # noqa: PLC0415  slow, and optional
        from mlflow.tracking import MlflowClient  # noqa: PLC0415

        try:
            uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT
            self._client = MlflowClient(tracking_uri=uri)
            earlier = self._earlier() if history.rounds else None
            if earlier:
                self._mlflow_id = earlier.info.run_id
                self._client.update_run(self._mlflow_id, status="RUNNING")
                self._last_step = self._written_steps()
            else:
                self._create(run_config(settings, clients))
        except (MlflowException, ValueError, OSError) as error:
            self._client = None
            reason = printable(without_credentials(error), _LONGEST_REASON)
            raise TrackingError(f"MLflow did not start ({reason}); see tracking.uri") from error
        self._replay(history)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the scores of the last and the best round, and end the run."""
        self._write(summary_values(summary), max(self._last_step, 0))
        self._end("FINISHED")

    def fail(self, reason: str, status: str = FAILED) -> None:
        """Write the reason and end the run, if one was opened."""
        if self._client is not None:
            text = printable(without_credentials(reason), _LONGEST_VALUE)
            self._client.set_tag(self._mlflow_id, "reason", text)
            self._end("KILLED" if status == INTERRUPTED else "FAILED")

    def _write(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _METRICS_AT_ONCE):
            some = metrics[start : start + _METRICS_AT_ONCE]
            self._opened().log_batch(self._mlflow_id, metrics=some)

    def _create(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param  # noqa: PLC0415

        client = self._opened()
        tags = {_RUN_TAG: self._tag}
        run = client.create_run(self._experiment_id(), tags=tags, run_name=self._name)
        self._mlflow_id = run.info.run_id
        values = flat(config).items()
        params = [Param(name, printable(value, _LONGEST_VALUE)) for name, value in values]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            some = params[start : start + _PARAMS_AT_ONCE]
            client.log_batch(self._mlflow_id, params=some)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        client = self._opened()
        if found := client.get_experiment_by_name(self._experiment):
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(self._experiment))
        except MlflowException:  # another run was faster
            if found := client.get_experiment_by_name(self._experiment):
                return str(found.experiment_id)
            raise

    def _earlier(self) -> "Run | None":
        """Return the MLflow run of the federation that goes on."""
        query = f"tags.`{_RUN_TAG}` = '{self._tag}'"
        return next(iter(self._opened().search_runs([self._experiment_id()], query)), None)

    def _written_steps(self) -> int:
        history = self._opened().get_metric_history(self._mlflow_id, "round/seconds")
        return max((int(metric.step) for metric in history), default=-1)

    def _end(self, status: str) -> None:
        client = self._opened()
        client.set_terminated(self._mlflow_id, status)
        self._client = None

    def _opened(self) -> "MlflowClient":
        if self._client is None:
            raise RuntimeError(
                f"MLflow run {self._name!r}: logged to before start or after the end"
            )
        return self._client
