"""Settings of a whole run, the same for every strategy."""

from dataclasses import dataclass, field
from functools import cached_property

from hafl_app.heads.settings import ClosedFormSettings
from hafl_app.plan import HeadPolicy
from hafl_app.privacy.mechanism import PrivacyOptions
from hafl_app.server.rate_schedule import round_rates
from hafl_app.server.settings import FederationSettings
from hafl_app.training.settings import ClientSettings, LoraSettings


@dataclass(frozen=True)
class RunOptions:
    """Settings of a whole run, one field for each room.

    Parameters
    ----------
    federation
        Rounds, selection, validation of replies, uploads.
    client
        Length and learning rate of local training.
    lora
        ``lora_alpha`` and how it becomes a scaling.
    privacy
        Differential privacy of the run, with the key of its noise.
    head
        Treatment of the classification head, see `TrainPlan`.
    closed_form
        How the head is solved from sums of features; None: it is not.
    head_refresh_every
        Rounds between those after which it is solved anew; 0: never.
    seed
        Seed of client selection.
    """

    federation: FederationSettings = field(default_factory=FederationSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    head: HeadPolicy = "averaged"
    closed_form: ClosedFormSettings | None = None
    head_refresh_every: int = 0
    seed: int = 0

    @cached_property
    def last_round(self) -> int:
        """The last round that the privacy budget allows; 0 if it does not suffice for any."""
        if self.privacy.kind == "none":
            return self.federation.num_rounds
        from hafl_app.privacy.accounting import rounds_within  # noqa: PLC0415  takes a second

        rate = self.federation.fraction_train
        return rounds_within(self.privacy, rate, self.federation.num_rounds)

    @cached_property
    def _rates(self) -> tuple[float, ...]:
        return round_rates(self.client.schedule, self.last_round)

    def rate(self, server_round: int) -> float:
        """Return a round's learning rate over ``client.learning_rate``."""
        return self._rates[server_round - 1] if self.client.schedule.changes else 1.0

    def rates_until(self, server_round: int) -> tuple[float, ...]:
        """Return the rates of the rounds up to this one, as a plan for all of them has them."""
        return self._rates[:server_round] if self.client.schedule.changes else (1.0,)

    def is_head_due(self, server_round: int) -> bool:
        """Whether the head is solved after this round; round 0 is before the first."""
        if self.closed_form is None:
            return False
        every = self.head_refresh_every
        return server_round == 0 or (every > 0 and server_round % every == 0)

    def is_evaluated(self, server_round: int) -> bool:
        """Whether the global adapter after this round is evaluated, by nodes and server."""
        due = server_round % self.federation.evaluate_every == 0
        return due or server_round == self.last_round
