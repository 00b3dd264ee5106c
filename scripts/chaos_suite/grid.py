"""A network and clients that fail by a schedule, and the journal of faults and rejections."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType

from chaos_suite.faults import Kind, Schedule, spoil
from hafl_app.client_app import app as client_app
from hafl_app.engines.in_process import InProcessGrid
from hafl_app.wire.records import CONFIG, SERVER_ROUND

JOURNAL = "faults.jsonl"
# The server's log of a reply, in the words of server.round_messages and server.rounds.
_REFUSED = re.compile(r"round \d+, node \d+ \(partition (\d+)\): train reply rejected: (.*)", re.S)
_TURNED_AWAY = re.compile(
    r"round \d+, node (\d+): (a second reply|a reply to no request of this round)"
)
_LOST = re.compile(r"round \d+: .*\(attempt \d+ of \d+\)", re.S)


class Journal(logging.Handler):
    """Journal of injected faults and the server's log of them, a line each, whole after a kill.

    Every line has ``event``, ``round`` and ``attempt``.

    Parameters
    ----------
    path
        Lines are added to it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._path = path
        self._now: dict[str, Any] = {"round": 0, "attempt": 0}

    def training(self, server_round: int, attempt: int) -> None:
        """Begin a training phase; the following lines belong to it."""
        self._now = {"round": server_round, "attempt": attempt}
        self.note("training")

    def note(self, event: str, **values: Any) -> None:
        """Add a line."""
        line = json.dumps({"event": event, **self._now, **values})
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Add what the server logs of a reply or a round."""
        text = record.getMessage()
        if found := _REFUSED.fullmatch(text):
            self.note("refused", partition=int(found[1]), reason=found[2])
        elif found := _TURNED_AWAY.fullmatch(text):
            # In the in-process engine.
            self.note("turned away", partition=int(found[1]) - 1, reason=found[2])
        elif _LOST.fullmatch(text):
            self.note("lost")


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Return the journal's lines; of a phase that was repeated after a kill, the last time's."""
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line["event"] == "training":
            # A resumed run repeats the round with all its attempts.
            again = line["round"], line["attempt"]
            kept = [k for k in kept if (k["round"], k["attempt"]) < again]
        kept.append(line)
    return kept


class ChaoticGrid(InProcessGrid):
    """Virtual nodes and a network that fail in training by a schedule.

    A late reply is withheld, and delivered before the replies of the next training phase.

    Parameters
    ----------
    run_config
        As in `InProcessGrid`, as is the number of nodes.
    schedule
        Asked for every training phase.
    journal
        Gets each fault when it is injected.
    on_training
        Called with the round when its training begins.
    """

    def __init__(
        self,
        num_nodes: int,
        run_config: Mapping[str, Any],
        schedule: Schedule,
        journal: Journal,
        on_training: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__(client_app, num_nodes, run_config)
        self._schedule = schedule
        self._journal = journal
        self._on_training = on_training
        self._attempts: Counter[int] = Counter()
        self._withheld: list[Message] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver the messages to their nodes, and return the replies that the faults leave."""
        asked = list(messages)
        if not asked or asked[0].metadata.message_type != MessageType.TRAIN:
            return super().send_and_receive(asked, timeout=timeout)
        server_round = int(asked[0].content.config_records[CONFIG][SERVER_ROUND])  # type: ignore[arg-type]
        attempt = self._attempts[server_round]
        self._attempts[server_round] += 1
        self._journal.training(server_round, attempt)
        self._on_training(server_round)
        replies = list(super().send_and_receive(asked, timeout=timeout))
        faults = self._schedule.of_round(server_round, attempt)
        delivered = self._with_faults(list(zip(asked, replies, strict=True)), faults)
        self._journal.note("answered")
        return delivered

    def _with_faults(
        self, pairs: Sequence[tuple[Message, Message]], faults: Mapping[int, Kind]
    ) -> list[Message]:
        stale, self._withheld = self._withheld, []
        delivered: list[Message] = []
        for request, reply in pairs:
            partition_id = request.metadata.dst_node_id - 1  # in the in-process engine
            kind = faults.get(partition_id)
            if kind is None or reply.has_error():
                delivered.append(reply)
                continue
            self._inject(partition_id, kind)
            spoil(reply, request, kind)
            if kind is Kind.LATE:
                self._withheld.append(reply)
            copies = {Kind.DROPPED: 0, Kind.LATE: 0, Kind.DUPLICATED: 2}.get(kind, 1)
            delivered += [reply] * copies
        for reply in stale:
            self._inject(reply.metadata.src_node_id - 1, Kind.STALE)
        return stale + delivered

    def _inject(self, partition_id: int, kind: Kind) -> None:
        self._journal.note("injected", partition=partition_id, kind=kind.value)
