"""The fold of every method that averages factors, and mends what their product lacks."""

from dataclasses import dataclass

from hafl_app.lowrank.factors import Adapter
from hafl_app.server.aggregation import empty_product_sum
from hafl_app.server.options import RunOptions
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.component_mean import Sums, add_components, empty_components
from hafl_app.strategies.product_mean import ProductSums, add_products, empty_products


@dataclass(frozen=True)
class FactorAndProductSums:
    """A round's fold: sums of the factors, and sums of their products."""

    factors: Sums
    products: ProductSums

    @classmethod
    def empty(cls, adapter: Adapter, options: RunOptions) -> "FactorAndProductSums":
        """Return empty sums of the components of ``adapter``."""
        sums = empty_components(adapter, options)
        return cls(sums, empty_products(adapter, empty_product_sum(options)))

    def add(self, update: ClientUpdate) -> "FactorAndProductSums":
        """Return the sums with a client's factors and products, weighted by its examples."""
        sums = add_components(self.factors, update, float(update.num_examples))
        return FactorAndProductSums(sums, add_products(self.products, update))
