"""The head in closed form: ask all clients for sums of features, add them up, solve.

Before round 1, and after the rounds that the settings name, every client that can be reached gets
the same adapter, the whole global one, and sends the sums over its examples. The head that follows
is that of all their examples in one place, whoever has which. All ranks get this one head.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from hafl_app.heads.feature_sums import FeatureSums
from hafl_app.heads.linear_head import LinearHead, feature_width, with_output_layer
from hafl_app.heads.plausibility import implausible
from hafl_app.heads.projection import random_projection
from hafl_app.heads.settings import ClosedFormSettings
from hafl_app.heads.solve import (
    SolvedHead,
    ValidationFeatures,
    bounded_losses,
    is_at_edge,
    solve,
    validation_losses,
)
from hafl_app.heads.temperature import TEMPERATURES, best_temperature
from hafl_app.lowrank.factors import Adapter
from hafl_app.server.forward_exchange import ForwardExchange
from hafl_app.server.method import Method
from hafl_app.server.participation import Participation
from hafl_app.server.reply_validation import ReplyError
from hafl_app.server.round_messages import STATED_EXAMPLES, RoundMessages
from hafl_app.wire.feature_sums import SumsFormat, read_losses, read_sums
from hafl_app.wire.message_types import EVALUATE_TEMPERATURES, QUERY_FEATURE_SUMS
from hafl_app.wire.records import NUM_EXAMPLES

_LOGGER = logging.getLogger(__name__)


class TooFewSumsError(RuntimeError):
    """Fewer clients' sums count than a round needs replies; the head has not changed."""


@dataclass(frozen=True)
class HeadRecord:
    """How a head was solved.

    Parameters
    ----------
    server_round
        After which; 0 is before the first.
    clients
        Clients whose sums count.
    examples
        Examples that they count as.
    absent
        Partitions of known clients whose sums are not in it.
    ridge
        Strength; None of class means.
    temperature
        Divisor of the logits.
    """

    server_round: int
    clients: int
    examples: float
    absent: tuple[int, ...]
    ridge: float | None
    temperature: float


class ClosedFormHead:
    """The head of a run with ``model.head=closed_form``.

    Parameters
    ----------
    method
        Whose global adapter has the head.
    participation
        The run's nodes.
    new_exchange
        Returns the messages of a round and a phase.

    Attributes
    ----------
    validation
        Returns features and classes of the server's validation data under an adapter.
    records
        How the heads so far were solved.
    """

    def __init__(
        self,
        method: Method,
        participation: Participation,
        new_exchange: Callable[[int, str], RoundMessages],
    ) -> None:
        self._method = method
        self._participation = participation
        self._exchange = ForwardExchange(method, participation, new_exchange)
        self.validation: Callable[[Adapter], ValidationFeatures] | None = None
        self.records: list[HeadRecord] = []

    def solve(self, server_round: int, grid: Grid) -> None:
        """Give the global adapter a head that is solved from the sums of all reachable clients.

        Raises
        ------
        TooFewSumsError
            If fewer than ``federation.min_replies`` clients' sums count; nothing has changed.
        """
        settings, adapter = self._settings, self._method.global_adapter
        collected = self._collect(server_round, grid)
        validation = None
        if settings.chooses_on_validation and self.validation is not None:
            validation = self.validation(adapter)
        solved = solve(
            collected.sums,
            rule=settings.rule,
            strength=settings.ridge,
            validation=validation if settings.ridge_by == "validation" else None,
        )
        whole = solved.head.unprojected(self._projection)
        temperature = self._temperature(solved, validation, whole, server_round, grid)
        head = with_output_layer(adapter.head, whole.cooled(temperature))
        self._method.global_adapter = adapter.with_head(head)
        self._note(server_round, collected, solved.strength, temperature)

    def to_json(self) -> list[dict[str, Any]]:
        """Return how the heads were solved, as plain values."""
        return [asdict(record) | {"absent": list(record.absent)} for record in self.records]

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Read what `to_json` returned."""
        self.records = [HeadRecord(**{**one, "absent": tuple(one["absent"])}) for one in records]

    # ---- sums ------------------------------------------------------------------------------

    def _collect(self, server_round: int, grid: Grid) -> "_Collected":
        """Ask every reachable client for the sums of its features, and add them up."""
        asked, settings = self._format, self._settings
        federation = self._method.options.federation
        most_norm, most_examples = settings.most_norm(self._width), federation.max_examples_per_node

        def read(reply: Message, metrics: Mapping[str, float]) -> tuple[FeatureSums, float]:
            stated = int(metrics[STATED_EXAMPLES])
            if most_examples is not None and stated > most_examples:
                raise ReplyError(
                    f"sums over {stated} examples, expected at most {most_examples} "
                    "(federation.max_examples_per_node)"
                )
            sums = read_sums(reply.content, asked)
            if sums.num_examples != stated:
                raise ReplyError(
                    f"class counts add up to {sums.num_examples:.0f}, {NUM_EXAMPLES} is {stated}"
                )
            if reason := implausible(sums, most_norm):
                raise ReplyError(reason)
            weight = metrics[NUM_EXAMPLES] / stated  # of an example
            return sums.scaled(weight), weight**2 * stated

        total = FeatureSums.zeros(asked.width, asked.num_classes, moments=asked.moments)
        counted: list[int] = []
        squares = 0.0
        for profile, (sums, squared) in self._exchange.ask(
            server_round, grid, QUERY_FEATURE_SUMS, "frozen", {}, read, asked.payload_bytes
        ):
            total, squares = total + sums, squares + squared
            counted.append(profile.partition_id)
        if len(counted) < federation.min_replies:
            raise TooFewSumsError(
                f"closed-form head after round {server_round}: the sums of {len(counted)} clients "
                f"count, federation.min_replies={federation.min_replies}"
            )
        # Kish's number where examples weigh differently: what cross-validation reckons with.
        effective = total.num_examples**2 / squares
        total = total.scaled(effective / total.num_examples)
        known = [profile.partition_id for profile in self._participation.trainable()]
        return _Collected(total, len(counted), tuple(p for p in known if p not in set(counted)))

    # ---- temperature -----------------------------------------------------------------------

    def _temperature(
        self,
        solved: SolvedHead,
        validation: ValidationFeatures | None,
        whole: LinearHead,
        server_round: int,
        grid: Grid,
    ) -> float:
        settings = self._settings
        if settings.temperature is not None:
            return settings.temperature
        if settings.asks_for_losses:
            losses = self._losses_of_clients(whole, server_round, grid)
        elif validation is not None:
            losses = validation_losses(solved.head, validation)
        else:
            raise ValueError("no validation data to choose the temperature on")
        chosen = best_temperature(losses)
        if is_at_edge(chosen):
            _LOGGER.warning(
                "closed-form head: temperature %g is the edge of those that are tried; "
                "model.closed_form.temperature sets another",
                chosen,
            )
        return chosen

    def _losses_of_clients(self, whole: LinearHead, server_round: int, grid: Grid) -> Tensor:
        """Return the cross entropy of all clients' held-out rows at each temperature."""
        head = with_output_layer(self._method.global_adapter.head, whole)
        classes = len(whole.bias)

        def read(reply: Message, metrics: Mapping[str, float]) -> Tensor:
            losses = read_losses(reply.content, len(TEMPERATURES))
            if not (losses.isfinite().all() and losses.min() >= 0):
                raise ReplyError("losses by temperature: expected finite numbers from 0")
            stated = metrics[STATED_EXAMPLES]
            return bounded_losses(losses, stated, classes) * (metrics[NUM_EXAMPLES] / stated)

        total = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        size = total.element_size() * len(total)
        count = 0
        for _, losses in self._exchange.ask(
            server_round, grid, EVALUATE_TEMPERATURES, "sent", head, read, size
        ):
            total += losses
            count += 1
        if not count:
            raise TooFewSumsError(
                f"closed-form head after round {server_round}: no client's losses by temperature "
                "count"
            )
        return total

    def _note(
        self, server_round: int, collected: "_Collected", ridge: float | None, temperature: float
    ) -> None:
        sums = collected.sums
        self.records.append(
            HeadRecord(
                *(server_round, collected.clients, sums.num_examples, collected.absent),
                *(ridge, temperature),
            )
        )
        strength = "" if ridge is None else f", ridge {ridge:.2g}"
        _LOGGER.info(
            "closed-form head after round %d: %.0f examples of %d clients%s, temperature %.3g",
            *(server_round, sums.num_examples, collected.clients, strength, temperature),
        )
        if collected.absent:
            _LOGGER.warning(
                "closed-form head after round %d: without partitions %s",
                *(server_round, ", ".join(map(str, collected.absent))),
            )
        if missing := int((sums.class_counts == 0).sum()):
            _LOGGER.warning(
                "closed-form head after round %d: %d classes have no example",
                *(server_round, missing),
            )

    @property
    def _settings(self) -> ClosedFormSettings:
        settings = self._method.options.closed_form
        if settings is None:
            raise ValueError("the head of this run is not solved from sums")
        return settings

    @property
    def _num_classes(self) -> int:
        *_, last = self._method.global_adapter.head.values()  # weight or bias of the output layer
        return len(last)

    @property
    def _width(self) -> int:
        """Features that the output layer reads."""
        return feature_width(self._method.global_adapter.head, self._num_classes)

    @property
    def _format(self) -> SumsFormat:
        settings = self._settings
        return SumsFormat(
            settings.size(self._width),
            self._num_classes,
            settings.asks_for_moments,
            settings.numbers,
        )

    @property
    def _projection(self) -> Tensor | None:
        settings, width = self._settings, self._width
        if not settings.projects(width):
            return None
        return random_projection(width, settings.size(width), self._method.options.seed)


@dataclass(frozen=True)
class _Collected:
    """The sums of some clients, how many they are, and the partitions of the others."""

    sums: FeatureSums
    clients: int
    absent: tuple[int, ...]
