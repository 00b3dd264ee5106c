"""Content of one exported folder."""

from dataclasses import dataclass, field
from typing import Literal

from hafl_app.publishing.run_facts import RunFacts
from hafl_app.publishing.truncation import Truncation
from hafl_app.publishing.usage import kind_of
from hafl_app.training.adapter_files import StoredAdapter
from hafl_app.training.peft_format import largest_rank

Form = Literal["peft", "merged", "gguf"]
"""What a folder holds: an adapter in PEFT's format, a whole model, or an adapter in GGUF."""


@dataclass(frozen=True)
class Exported:
    """Exported folder for others to use.

    Parameters
    ----------
    name
        Of the folder.
    stored
        What is in it: the adapter, cut already if it is to be.
    run
        Where it comes from.
    form
        Of the weights.
    truncation
        How the adapter was cut; `None` for a whole one.
    """

    name: str
    stored: StoredAdapter
    run: RunFacts = field(default_factory=RunFacts)
    form: Form = "peft"
    truncation: Truncation | None = None

    @property
    def merged(self) -> bool:
        """Whether the folder holds a whole model, and not an adapter."""
        return self.form == "merged"

    @property
    def kind(self) -> str:
        """The model's kind of task, see `hafl_app.publishing.usage.kind_of`."""
        return kind_of(self.stored.spec.base)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return largest_rank(self.stored.adapter)

    @property
    def method(self) -> str:
        """Name of the federated method; ``LoRA`` where the folder does not say."""
        target = self.stored.facts.get("strategy", {}).get("_target_", "LoRA")
        return str(target).rpartition(".")[2]

    @property
    def is_cut(self) -> bool:
        """Whether the run's scores are those of a larger adapter, now or in an earlier cut."""
        return self.truncation is not None or "truncation" in self.stored.facts

    @property
    def is_federated(self) -> bool:
        """Whether the data stayed with clients; False for the centralized reference."""
        return not self.stored.facts.get("centralized", False)

    @property
    def measured_at_rank(self) -> float | None:
        """The test score of this very cut, if the run measured it; `None` otherwise."""
        is_last = self.stored.facts.get("server_round") == self.run.summary.get("rounds")
        if self.truncation is None or not is_last:
            return None
        return self.run.score_at_rank(self.truncation.rank)
