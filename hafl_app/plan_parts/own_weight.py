"""OwnWeight: the rule by which a client weighs its own upload in a secure sum.

Part of a `hafl_app.plan.TrainPlan`, and standard library only as that is.
"""

from dataclasses import dataclass
from typing import Final

NORMS_OF: Final = ("state", "change")
NORM_SCOPES: Final = ("module", "client")


@dataclass(frozen=True)
class OwnWeight:
    """A client weighs its components by a norm of its own product, and masks the weight too.

    The server learns sums of weighted components and of weights. Nothing of a client's norm is
    seen, so nothing of it is checked. Without a secure sum the rule is without effect.

    Parameters
    ----------
    norm_of
        ``state``: ``||B_k A_k||_F``; ``change``: ``||B_k A_k - sent_k||_F``.
    scope
        ``module``: a weight in each module. ``client``: one, the sum over modules.
    """

    norm_of: str
    scope: str

    def __post_init__(self) -> None:
        # A plan comes over the wire: a word that no branch knows would silently do something else.
        self._require("norm_of", NORMS_OF)
        self._require("scope", NORM_SCOPES)

    def _require(self, name: str, known: tuple[str, ...]) -> None:
        if (value := getattr(self, name)) not in known:
            raise ValueError(f"own_weight: {name} is {value!r}, expected {' or '.join(known)}")
