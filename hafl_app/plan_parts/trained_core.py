"""Core: a small square matrix that is trained between two frozen bases, in place of a factor.

Part of a `hafl_app.plan_parts.module_plan.ModulePlan`, and standard library only as that is.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Core:
    """Components whose lora_A and lora_B are frozen bases, with trained cores between them.

    The held components are cut into blocks of ``size``; block h adds ``B_h R_h A_h`` to the weight,
    ``B_h`` (out_features, size) and ``A_h`` (size, in_features) frozen, ``R_h`` (size, size) the
    core. The bases follow from the seed on both sides and never travel: a message has the cores
    alone, as a lora_B of ``size`` rows, see `hafl_app.lowrank.cores`.

    Parameters
    ----------
    size
        Rows and columns of a core, at least 1.
    rank
        Components for which bases are drawn: those of the global adapter.
    seed
        Of the bases, at least 0.
    scaled
        Whether each core is trained with a factor of its own, 1 at the start of every training and
        part of the core that is uploaded.
    """

    size: int
    rank: int
    seed: int
    scaled: bool = False

    def __post_init__(self) -> None:
        # A plan comes over the wire.
        for name, least in (("size", 1), ("rank", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"core {name} is {value!r}, expected a whole number from {least}")
        if not isinstance(self.scaled, bool):
            raise ValueError(  # noqa: TRY004  as of all values of a plan
                f"core scaled is {self.scaled!r}, expected true or false"
            )

    def check(self, components: Sequence[int]) -> None:
        """Refuse components that are no whole blocks of the bases, each in its order.

        Raises
        ------
        ValueError
            Naming the first that is out of place.
        """
        for position, component in enumerate(components):
            offset = position % self.size
            first = components[position - offset]
            whole = first % self.size == 0 and len(components) % self.size == 0
            if not whole or component != first + offset or component >= self.rank:
                raise ValueError(
                    f"component {component} is not in a whole block of {self.size} of the core's "
                    f"{self.rank} components"
                )
