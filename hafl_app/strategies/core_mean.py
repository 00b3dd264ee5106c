"""The fold of every method that trains cores between frozen bases: a mean of cores."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hafl_app.lowrank.cores import cores_of, frozen_bases, with_cores
from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.trained_core import Core
from hafl_app.server.method import Traits
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.component_mean import ComponentMean, Sums, over_contributors

OF_CORES = Traits(
    trains_cores=True,
    sums_updates=True,
    coverage_exponent=None,  # its updates have cores in place of whole factors
    not_robust="the median of what cores make of a basis is made by no core",
    dp_refusal="privacy=central_dp adds noise to every number of lora_B, and a core has fewer; "
    "privacy=local_dp adds it to the cores",
)
"""What holds for every such method."""


@dataclass(kw_only=True, eq=False)
class CoreMean(ComponentMean, ABC):
    """Template of a method whose adapter is ``sum_h B_h R_h A_h`` with frozen bases.

    The global adapter has the bases as lora_A and ``B_h R_h`` as lora_B, so that it is scored, cut,
    saved and exported as any other. The mean of ``B_h R_{k,h}`` is ``B_h`` times the mean of the
    cores, and so is that of the products: exact. Clients receive and upload the cores alone.
    """

    traits = OF_CORES

    def core_module(
        self, held: range, trainable: tuple[int, ...], size: int, *, scaled: bool = False
    ) -> ModulePlan:
        """Plan for a module whose held components are blocks of ``size``, some of them trained."""
        core = Core(size, self.max_rank, self.options.seed, scaled)
        scaling = self.scaling_of(len(held))
        return ModulePlan(tuple(held), trainable, scaling, factors="B", core=core)

    def dispatch(self, plan: TrainPlan) -> Adapter:
        """Cut the global adapter to the cores that a client holds."""
        whole, bases = super().dispatch(plan), self.bases()
        return Adapter(
            {
                name: cores_of(factors, bases[name].select(module.held), module.core.size)
                for name, factors in whole.modules.items()
                if (module := plan.modules[name]).core is not None
            },
            whole.head,
        )

    def accumulate(self, state: Sums, update: ClientUpdate) -> Sums:
        """Add what the client's cores make of the bases."""
        bases = self.bases()
        modules = {
            name: with_cores(cores, bases[name].select(update.components(name)))
            for name, cores in update.adapter.modules.items()
        }
        adapter = Adapter(modules, update.adapter.head)
        return super().accumulate(state, replace(update, adapter=adapter))

    def finish(self, state: Sums, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Divide by the weight of those who trained a core."""
        return over_contributors(state, previous)

    def bases(self) -> Mapping[str, LoraFactors]:
        """Return the frozen bases of every module, of ``max_rank`` components."""
        shapes = {n: ModuleShape.of(f) for n, f in self.global_adapter.modules.items()}
        return frozen_bases(shapes, self.max_rank, self.options.seed)
