"""FedRot-LoRA: clients rotate their factors toward what they were sent, and FedIT averages them.

Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", ICML 2026,
arXiv:2602.23638.
"""

from dataclasses import dataclass

from hafl_app.fields import choice, number
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.alignment import Alignment
from hafl_app.strategies.fedit import FedIt
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class FedRotLora(FedIt):
    """FedIT over factors that lie as close as a rotation can bring them.

    One update has many factorizations, ``(B_k R)(R^T A_k) = B_k A_k``, and the mean of factors that
    are rotated against each other cancels. After training, each client solves

    - with ``factor=A``: ``R_k = argmin ||R^T A_k - A_sent||_F``
    - with ``factor=B``: ``R_k = argmin ||B_k R - B_sent||_F``

    over rotations, in closed form by the SVD of a matrix of rank x rank; softens it,
    ``R <- polar((1 - lambda) I + lambda R_k)``; and uploads ``B_k R`` and ``R^T A_k``, of which the
    server takes FedIT's mean. Nothing else travels, and the model of no client changes.

    Differs from the paper, of which a review and the authors' code were read: as there, A is
    aligned in every other round and B in those between, and neither in the first round, where the
    lora_B that was sent is 0. Where what was sent does not determine a rotation, the factors stay
    as they are; the code takes any. Its rescaling and its random rotations, both ablations, are
    left out.

    Parameters
    ----------
    rotation_weight
        ``lambda`` in [0, 1]. 0 is FedIT. The paper found the best between 0.4 and 0.6.
    align
        ``alternating``, the paper's; ``A`` or ``B`` as its ablation.
    """

    rotation_weight: float = number(0.5, at_least=0, at_most=1)
    align: str = choice("alternating", "alternating", "A", "B")

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains all of its rank, and rotates it unless this is the first round."""
        return self.prefix_plan(self.budgets(profile), align=self._alignment(server_round))

    def _alignment(self, server_round: int) -> Alignment | None:
        if server_round == 1 or self.rotation_weight == 0:
            return None
        if self.align == "alternating":
            return Alignment("A" if server_round % 2 == 0 else "B", self.rotation_weight)
        return Alignment("A" if self.align == "A" else "B", self.rotation_weight)
