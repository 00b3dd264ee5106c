"""LoRA-FAIR: average the factors, and correct lora_B toward the mean of products.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
ICCV 2025, arXiv:2411.14961.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hafl_app.fields import number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.product_sum import ProductSum
from hafl_app.plan import TrainPlan
from hafl_app.server.method import Traits
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.strategies.component_mean import over_contributors
from hafl_app.strategies.factors_and_products import FactorAndProductSums
from hafl_app.strategies.product_mean import OF_PRODUCTS, mean_of_changes
from hafl_app.wire.node_profile import NodeProfile

_CORRECTED = "arXiv:2411.14961, equation 8: between the mean of factors and that of products"


@dataclass(kw_only=True, eq=False)
class LoraFair(HeterogeneousLora):
    """FedIT's factors, lora_B corrected on the server; what travels is what FedIT sends.

    With ``w_k ~ num_examples``, ``A = sum_k w_k A_k``, ``B = sum_k w_k B_k`` and the residual
    ``R = sum_k w_k B_k A_k - B A``:

    ``D = argmin ||R - D A||_F^2 + lambda ||D||_F^2 = R A^T (A A^T + lambda I)^-1``

    and the clients go on with A and ``B + D``. lambda weighs a model closer to the mean of products
    against a start closer to the mean of factors. At 0 the model is as close to the mean of
    products as this A allows, ``sum_k w_k B_k A_k`` projected onto the rows of A; the paper found
    that worse than FedIT.

    Reconstruction: the paper was read in reviews. It minimizes a dissimilarity by the cosine plus
    ``lambda ||D||`` with SGD, whose steps and learning rate were not found, and has lambda = 0.01.
    A re-implementation has the squared distance of here, whose minimum is known in closed form and
    does not depend on where a search ends; lambda then has another unit, that of ``A A^T``. R is
    never made dense. Ranks are one, as in the paper.

    Parameters
    ----------
    regularization
        ``lambda``, at least 0. The rows of a new lora_A have a squared norm of about 1/3.
    """

    traits = Traits(
        serves_mixed_ranks=False,
        not_robust="it corrects toward a mean of products, of which it keeps low-rank factors",
        dp_refusal=OF_PRODUCTS.dp_refusal,
        breaks={"homogeneous form": _CORRECTED},
    )

    regularization: float = number(0.01, at_least=0)

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains the same components: all of its rank."""
        return self.prefix_plan(self.budgets(profile))

    def begin(self, previous: Adapter) -> FactorAndProductSums:
        """Return empty sums."""
        return FactorAndProductSums.empty(previous, self.options)

    def accumulate(self, state: FactorAndProductSums, update: ClientUpdate) -> FactorAndProductSums:
        """Add the client's factors, and its products."""
        return state.add(update)

    def finish(self, state: FactorAndProductSums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Average the factors, and correct lora_B of those that were trained."""
        averaged = over_contributors(state.factors, previous)
        models = mean_of_changes(state.products, previous.modules)
        corrected = {}
        for name, mean in averaged.items():
            trained = torch.nonzero(state.products.trained[name]).flatten().tolist()
            residual, part = models[name].add(mean, -1.0), mean.select(trained)
            corrected[name] = mean.replace(trained, self._corrected(part, residual))
        return corrected

    def _corrected(self, mean: LoraFactors, residual: ProductSum) -> LoraFactors:
        """Return the factors with lora_B moved by ``R A^T (A A^T + lambda I)^-1``."""
        lora_A = mean.lora_A.double()
        gram = lora_A @ lora_A.T + self.regularization * torch.eye(mean.rank).to(lora_A)
        # The pseudo-inverse, for lambda = 0 and rows that are not independent.
        correction = residual.times(lora_A.T) @ torch.linalg.pinv(gram, hermitian=True)
        return LoraFactors(mean.lora_A, (mean.lora_B.double() + correction).to(mean.lora_B.dtype))
