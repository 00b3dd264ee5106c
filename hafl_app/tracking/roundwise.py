"""What trackers with one step a round have in common: the round's numbers are written at once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from hafl_app.tracking.base import ClientRecord, History, RoundRecord
from hafl_app.tracking.values import client_values, round_values


class RoundwiseTracker(ABC):
    """Base of trackers that write a round's numbers, those of its clients among them, as one step.

    A round that was written before a run stopped, and is trained again by the one that goes on, is
    not written twice.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._last_step = -1

    def log_client(self, record: ClientRecord) -> None:
        """Keep a client's numbers for its round's step."""
        self._values |= client_values(record)

    def log_round(self, record: RoundRecord) -> None:
        """Write the numbers of the round and of its clients at its step."""
        values, self._values = {**self._values, **round_values(record)}, {}
        if record.server_round > self._last_step:
            self._write(values, record.server_round)
            self._last_step = record.server_round

    def _replay(self, history: History) -> None:
        """Write the rounds of a history that are not there, as of a tracker switched on later."""
        for record in history.rounds:
            for client in history.clients:
                if client.server_round == record.server_round:
                    self.log_client(client)
            self.log_round(record)

    @abstractmethod
    def _write(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name at a step.

        Raises
        ------
        RuntimeError
            Before the start, or after the end.
        """
