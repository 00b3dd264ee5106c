"""The settings that hold for a whole run, whatever the method."""

from dataclasses import dataclass, field

from hafl_app.plan import HeadPolicy
from hafl_app.privacy.mechanism import PrivacyOptions
from hafl_app.server.settings import FederationSettings
from hafl_app.training.settings import ClientSettings, LoraSettings


@dataclass(frozen=True)
class RunOptions:
    """What holds for a whole run: the settings of several rooms, side by side.

    Parameters
    ----------
    federation
        Rounds, selection, validation of replies, uploads.
    client
        Length and learning rate of local training.
    lora
        ``lora_alpha`` and how it becomes a scaling.
    privacy
        How private the run is, with the key of its noise.
    head
        What happens to the classification head, see `TrainPlan`.
    seed
        Decides who takes part in which round.
    """

    federation: FederationSettings = field(default_factory=FederationSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    head: HeadPolicy = "averaged"
    seed: int = 0
