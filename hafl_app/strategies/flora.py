"""FLoRA: stack the clients' factors, merge the stack into the base, start anew.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv:2409.05976.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.fields import choice
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.product_sum import ProductSum
from hafl_app.lowrank.spectrum import Spectrum
from hafl_app.plan import TrainPlan
from hafl_app.strategies.base_change import FreshStart, extended
from hafl_app.strategies.product_mean import ProductSums, mean_of_changes
from hafl_app.wire.node_profile import NodeProfile


@dataclass(kw_only=True, eq=False)
class Flora(FreshStart):
    """The stack of all factors is their exact mean of products, whatever their ranks.

    ``A = [w_1 A_1; ...; w_K A_K]``, ``B = [B_1, ..., B_K]``, ``w_k ~ num_examples``, so that
    ``B A = sum_k w_k B_k A_k``; the weights stand in one factor. Each round
    ``W <- W + sum_k w_k B_k A_k``, and with T the components that all start from:

    - ``restart=fresh``, the paper's: T is drawn anew, its lora_B is 0.
    - ``restart=warm``: of everything learned so far, T is the ``max_rank`` largest singular
      components, the others stay in the base; a client goes on with the first of T that its rank
      allows, holds the others frozen, and ``M <- M + sum_k w_k (B_k A_k - T_k)``, ``T_k`` being
      the components of T that k trained.

    Either way nothing is lost to truncation, and the model of every client starts at the mean of
    all models.

    Differs from the paper: ``warm`` is ours. The paper sends the stack of one round, which every
    client merges into its weights; here nodes keep nothing, so that the change of all rounds
    travels each time, at the least rank that holds it (at most ``min(out, in)``). All clients of a
    round share one fresh lora_A, where the paper's clients draw their own. Released code scales
    all ranks alike (``lora_alpha = 2 r``); here lora_B has each client's own scaling folded in.

    Parameters
    ----------
    restart
        ``fresh`` or ``warm``.
    """

    restart: str = choice("fresh", "fresh", "warm")

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client trains the first components beside the base and, if warm, all others."""
        return self.base_plan(self.budgets(profile), untrained=self.restart == "warm")

    def finish(self, state: ProductSums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Stack, and split what was learned into the start of the next round and the base."""
        base, stacks = self.base(previous), mean_of_changes(state, self.trainable(previous))
        if self.restart == "warm":
            return {name: self._warm(stacks[name].add(f, 1.0), f) for name, f in base.items()}
        fresh = self.fresh(previous)
        return {
            name: fresh[name].joined(extended(f, Spectrum.of(stacks[name]).factors(f.lora_A.dtype)))
            for name, f in base.items()
        }

    def _warm(self, learned: ProductSum, like: LoraFactors) -> LoraFactors:
        spectrum, dtype = Spectrum.of(learned), like.lora_A.dtype
        first = spectrum.trainable(self.max_rank, dtype, "B")
        return first.joined(spectrum.factors(dtype, self.max_rank))
