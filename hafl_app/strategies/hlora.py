"""HLoRA: FlexLoRA's mean of the dense updates, with the singular values in lora_A.

Liu et al., "HLoRA: Efficient Federated Learning System for LLM Heterogeneous Fine-Tuning",
arXiv:2503.00813.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.spectrum import Spectrum
from hafl_app.strategies.product_mean import ProductMean, ProductSums, mean_of_products


@dataclass(kw_only=True, eq=False)
class HLora(ProductMean):
    """``M <- trunc(sum_k w_k B_k A_k)``, kept as ``lora_B = U``, ``lora_A = S V^T``.

    ``w_k ~ num_examples``; ``trunc`` keeps ``max_rank`` singular values, and a client of rank r
    receives the first r. The model is `FlexLora`'s of ``aggregation=state``; the steps are not:
    there lora_A has unit rows and lora_B all of the size, here lora_B has unit columns, so that at
    one learning rate a step turns the other factor. Where M has less rank, lora_A is 0 and lora_B
    completes the orthonormal basis, so that the component can learn.

    Reconstruction: the paper was read in accounts of it, so the split is second-hand. The SVD
    works on the stacked factors in float64; lora_B has each client's own scaling s folded in, so
    that what a client trains as its lora_B starts as ``U / s``.
    """

    def finish(self, state: ProductSums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of all participants, and decompose."""
        return {
            name: Spectrum.of(one).trainable(
                self.max_rank, previous.modules[name].lora_A.dtype, "A"
            )
            for name, one in mean_of_products(state).items()
        }
