"""Settings of a whole run, the same for every strategy."""

from dataclasses import dataclass, field

from hafl_app.plan import HeadPolicy
from hafl_app.privacy.mechanism import PrivacyOptions
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
    seed
        Seed of client selection.
    """

    federation: FederationSettings = field(default_factory=FederationSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    head: HeadPolicy = "averaged"
    seed: int = 0
