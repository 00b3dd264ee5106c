"""FLoRIST: stack the clients' factors, keep the singular values that matter, start anew.

Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated
Fine-Tuning of Large Language Models", MLSys 2026, arXiv:2506.09199.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hafl_app.fields import number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.spectrum import Spectrum
from hafl_app.strategies.base_change import FreshStart, extended
from hafl_app.strategies.product_mean import ProductSums, mean_of_changes

_THRESHOLD = "singular value thresholding, arXiv:2506.09199: it cuts what has little energy"


@dataclass(kw_only=True, eq=False)
class Florist(FreshStart):
    """FLoRA whose stack is cut, module by module, to the rank that has most of its energy.

    With ``sum_k w_k B_k A_k = U S V^T``, ``w_k ~ num_examples``, and p the smallest rank with
    ``sum_{i <= p} S_i^2 >= tau sum_i S_i^2``: ``W <- W + U_p S_p V_p^T``, and every client starts
    anew, its lora_B at 0. One change of rank p for all, whatever their own ranks.

    Differs from the paper: where `Flora` does, the accumulated change and the shared fresh lora_A.
    The SVD is of QR's small core (or, streaming, of the sum itself) in float64; the paper
    decomposes both stacks, with the same result.

    Parameters
    ----------
    energy
        ``tau`` in (0, 1], the paper's 0.80 to 0.99, tuned there for each model; 1 is `Flora`.
    """

    traits = replace(
        FreshStart.traits, breaks={"nothing lost": _THRESHOLD, "homogeneous form": _THRESHOLD}
    )

    energy: float = number(0.95, above=0, at_most=1)

    def finish(self, state: ProductSums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Stack, cut, and merge what is left into the base."""
        stacks = mean_of_changes(state, self.trainable(previous))
        fresh, merged = self.fresh(previous), {}
        for name, base in self.base(previous).items():
            spectrum = Spectrum.of(stacks[name])
            cut = spectrum.factors(base.lora_A.dtype, 0, spectrum.rank_of_energy(self.energy))
            merged[name] = fresh[name].joined(extended(base, cut))
        return merged
