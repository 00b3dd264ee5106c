"""The head in closed form: ask all clients for sums of features, add them up, solve.

Before round 1, and after the rounds that the settings name, every client that can be reached gets
the same adapter, the whole global one, and sends the sums over its examples. The head that follows
is that of all their examples in one place, whoever has which. After the last round it can be solved
once more for each smaller rank of the clients, from the adapter cut to it.
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
from hafl_app.heads.linear_head import feature_width, with_output_layer
from hafl_app.heads.plausibility import ImplausibleSumsError, plausible
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
from hafl_app.lowrank.svd import truncated_adapter
from hafl_app.server.forward_exchange import ForwardExchange
from hafl_app.server.method import Method
from hafl_app.server.participation import Participation
from hafl_app.server.reply_validation import ReplyError
from hafl_app.server.round_messages import STATED_EXAMPLES, RoundMessages
from hafl_app.wire.feature_sums import SumsFormat, read_losses, read_sums
from hafl_app.wire.message_types import EVALUATE_TEMPERATURES, QUERY_FEATURE_SUMS
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import NUM_EXAMPLES

_LOGGER = logging.getLogger(__name__)
_NO_SMALLER_RANK = (
    "model.closed_form.per_rank has no effect: no client's rank is below the adapter's"
)


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
    ranks
        Of the devices for whose cut of the adapter it is; empty: it is the whole adapter's.
    """

    server_round: int
    clients: int
    examples: float
    absent: tuple[int, ...]
    ridge: float | None
    temperature: float
    ranks: tuple[int, ...] = ()


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
    of_ranks
        Heads of the last adapter cut to the ranks of devices, by these ranks.
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
        self.of_ranks: dict[tuple[int, ...], Mapping[str, Tensor]] = {}

    def warn_of_no_effect(self) -> None:
        """Log settings that change nothing with this model and these clients, before round 1."""
        settings, width = self._settings, self._width
        if settings.projection is not None and not settings.projects(width):
            _LOGGER.warning(
                "model.closed_form.projection=%d has no effect: the encoder has %d features",
                *(settings.projection, width),
            )
        grows = not self._method.traits.keeps_components  # by stacking, above what it begins with
        if settings.per_rank and not grows and not self._smaller_budgets():
            _LOGGER.warning(_NO_SMALLER_RANK)

    def solve(self, server_round: int, grid: Grid) -> None:
        """Give the global adapter a head that is solved from the sums of all reachable clients.

        Raises
        ------
        TooFewSumsError
            If fewer than ``federation.min_replies`` clients' sums count; nothing has changed.
        """
        adapter = self._method.global_adapter
        self._method.global_adapter = adapter.with_head(self._solved(adapter, server_round, grid))

    def solve_for_ranks(self, server_round: int, grid: Grid) -> None:
        """Solve a head for each smaller budget of the clients, from the adapter cut to it.

        A budget for which too few sums count is left out, which is logged.
        """
        self.of_ranks = {}
        adapter = self._method.global_adapter
        if not (smaller := self._smaller_budgets()):
            _LOGGER.warning(_NO_SMALLER_RANK)
        for profile in smaller:
            cut = truncated_adapter(adapter, profile.rank_of)
            try:
                head = self._solved(cut, server_round, grid, profile.ranks)
            except TooFewSumsError as error:
                rank = "/".join(map(str, profile.ranks))
                _LOGGER.warning("%s; rank %s uses the whole adapter's", error, rank)
            else:
                self.of_ranks[profile.ranks] = head

    def _smaller_budgets(self) -> list[NodeProfile]:
        """Return a client of each budget that the global adapter does not fit."""
        budgets = {profile.ranks: profile for profile in self._participation.trainable()}
        fits = self._method.global_adapter.fits
        return [profile for _, profile in sorted(budgets.items()) if not fits(profile.rank_of)]

    def _solved(
        self, adapter: Adapter, server_round: int, grid: Grid, ranks: tuple[int, ...] = ()
    ) -> Mapping[str, Tensor]:
        """Return the head of an adapter, in the tensors of the model's own."""
        settings = self._settings
        collected = self._collect(adapter, server_round, grid)
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

        def ask_losses() -> Tensor:
            sent = adapter.with_head(with_output_layer(adapter.head, whole))
            return self._losses_of_clients(sent, server_round, grid)

        temperature = self._temperature(solved, validation, ask_losses)
        record = HeadRecord(
            *(server_round, collected.clients, collected.sums.num_examples, collected.absent),
            *(solved.strength, temperature, ranks),
        )
        self._note(record, collected.sums)
        return with_output_layer(adapter.head, whole.cooled(temperature))

    @property
    def by_rank(self) -> dict[int, Mapping[str, Tensor]]:
        """The heads `of_ranks` of devices with one rank for all modules, by this rank."""
        return {ranks[0]: head for ranks, head in self.of_ranks.items() if len(ranks) == 1}

    def to_json(self) -> list[dict[str, Any]]:
        """Return how the heads were solved, as plain values."""
        return [
            asdict(record) | {"absent": list(record.absent), "ranks": list(record.ranks)}
            for record in self.records
        ]

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Read what `to_json` returned."""
        self.records = [
            HeadRecord(
                **{**one, "absent": tuple(one["absent"]), "ranks": tuple(one.get("ranks", ()))}
            )
            for one in records
        ]

    # ---- sums ------------------------------------------------------------------------------

    def _collect(self, adapter: Adapter, server_round: int, grid: Grid) -> "_Collected":
        """Ask every reachable client for its sums under an adapter, and add them up."""
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
            try:
                sums = plausible(sums, most_norm)
            except ImplausibleSumsError as error:
                raise ReplyError(str(error)) from error
            weight = metrics[NUM_EXAMPLES] / stated  # of an example
            return sums.scaled(weight), weight**2 * stated

        total = FeatureSums.zeros(asked.width, asked.num_classes, moments=asked.moments)
        counted: list[int] = []
        squares = 0.0
        sent = adapter.with_head({})
        for profile, (sums, squared) in self._exchange.ask(
            server_round, grid, QUERY_FEATURE_SUMS, "frozen", sent, read, asked.payload_bytes
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
        ask_losses: Callable[[], Tensor],
    ) -> float:
        settings = self._settings
        if settings.temperature is not None:
            return settings.temperature
        if settings.asks_for_losses:
            losses = ask_losses()
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

    def _losses_of_clients(self, sent: Adapter, server_round: int, grid: Grid) -> Tensor:
        """Return the cross entropy of all clients' held-out rows at each temperature."""
        classes = self._num_classes

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
            server_round, grid, EVALUATE_TEMPERATURES, "sent", sent, read, size
        ):
            total += losses
            count += 1
        if not count:
            raise TooFewSumsError(
                f"closed-form head after round {server_round}: no client's losses by temperature "
                "count"
            )
        return total

    def _note(self, record: HeadRecord, sums: FeatureSums) -> None:
        self.records.append(record)
        which = f"rank {'/'.join(map(str, record.ranks))}: " if record.ranks else ""
        where = f"closed-form head after round {record.server_round}"
        strength = "" if record.ridge is None else f", ridge {record.ridge:.2g}"
        _LOGGER.info(
            "%s: %s%.0f examples of %d clients%s, temperature %.3g",
            *(where, which, record.examples, record.clients, strength, record.temperature),
        )
        if record.absent:
            _LOGGER.warning(
                "%s: %swithout partitions %s", where, which, ", ".join(map(str, record.absent))
            )
        if missing := int((sums.class_counts == 0).sum()):
            _LOGGER.warning("%s: %d classes have no example", where, missing)

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
