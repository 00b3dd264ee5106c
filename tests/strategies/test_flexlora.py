import pytest
import torch
from driving import (
    MAX_RANK,
    SHAPES,
    Client,
    merge,
    noise,
    nothing,
    run_options,
    strategy_named,
    update_of,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from hafl_app.lowrank.factors import Adapter, LoraFactors, initial_adapter
from hafl_app.lowrank.svd import singular_values, truncated_svd
from hafl_app.server.method import StrategyError
from hafl_app.strategies.base import HeterogeneousLora

# Ranks and examples: coverage f of components 0 to 3 is 73, 63, 38 and 7 of 73.
CLIENTS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (2, 25), (4, 7), (3, 31)])]
SHARES = torch.tensor([10, 25, 7, 31], dtype=torch.float64) / 73
COVERAGE = torch.tensor([73, 63, 38, 7], dtype=torch.float64) / 73


def dense(factors: LoraFactors) -> torch.Tensor:
    return factors.lora_B.double() @ factors.lora_A.double()


def best_approximation(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(matrix.double())
    return u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return bool((got.double() - expected).norm() < tolerance * expected.norm())


def set_modules(strategy: HeterogeneousLora, modules: dict[str, LoraFactors]) -> None:
    strategy.global_adapter = Adapter(modules, strategy.global_adapter.head)


def in_svd_form(strategy: HeterogeneousLora) -> HeterogeneousLora:
    set_modules(
        strategy,
        {n: truncated_svd(f, MAX_RANK) for n, f in strategy.global_adapter.modules.items()},
    )
    return strategy


def rounds(strategy: HeterogeneousLora, count: int, change=nothing) -> HeterogeneousLora:
    for server_round in range(1, count + 1):
        updates = [update_of(strategy, client, change, server_round) for client in CLIENTS]
        set_modules(strategy, merge(strategy, updates))
    return strategy


class TestState:
    def test_is_the_best_approximation_of_the_dense_mean(self):
        strategy = strategy_named("flexlora")
        updates = [update_of(strategy, client, noise) for client in CLIENTS]

        after = merge(strategy, updates)

        for name, factors in after.items():
            mean = sum(
                w * dense(u.adapter.modules[name]) for w, u in zip(SHARES, updates, strict=True)
            )
            assert torch.linalg.svdvals(mean)[MAX_RANK] > 0.01  # truncation has work to do
            assert close(dense(factors), best_approximation(mean, MAX_RANK))

    def test_agrees_with_peft(self):
        """PEFT's add_weighted_adapter("svd") folds alpha / r into the sum, like our lora_B."""
        alpha, shape = 8, SHAPES["query"]
        strategy = strategy_named("flexlora", "lora.scaling=per_rank", f"lora.lora_alpha={alpha}")
        strategy.options = run_options(lora_alpha=alpha, scaling="per_rank")
        updates = [update_of(strategy, client, noise) for client in CLIENTS]
        model = None
        for client, update in zip(CLIENTS, updates, strict=True):
            name, factors = f"client{client.partition_id}", update.adapter.modules["query"]
            config = LoraConfig(r=client.rank, lora_alpha=alpha, target_modules=["query"])
            if model is None:
                base = nn.ModuleDict(
                    {"query": nn.Linear(shape.in_features, shape.out_features, bias=False)}
                )
                model = get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            layer = model.base_model.model["query"]
            assert (
                update.plan.modules["query"].scaling == layer.scaling[name] == alpha / client.rank
            )
            layer.lora_A[name].weight.data = factors.lora_A.clone()
            layer.lora_B[name].weight.data = factors.lora_B / layer.scaling[name]
        model.add_weighted_adapter(
            [f"client{c.partition_id}" for c in CLIENTS],
            SHARES.tolist(),
            "merged",
            combination_type="svd",
            svd_rank=MAX_RANK,
        )

        after = merge(strategy, updates)["query"]

        expected = model.base_model.model["query"].get_delta_weight("merged").detach().double()
        assert close(dense(after), expected, 1e-5)  # PEFT decomposes in float32

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_a_client_receives_the_best_approximation_of_its_rank(self, rank):
        strategy = rounds(strategy_named("flexlora"), 1, noise)
        sent = strategy.dispatch(strategy.plan(Client(rank, 5, 0).profile, 2))

        for name, factors in strategy.global_adapter.modules.items():
            assert sent.modules[name].rank == rank
            assert close(dense(sent.modules[name]), best_approximation(dense(factors), rank))

    def test_a_component_without_content_has_an_orthogonal_row(self):
        strategy = strategy_named("flexlora")
        set_modules(strategy, dict(initial_adapter(SHAPES, MAX_RANK, seed=1).modules))

        rounds(strategy, 2)

        for factors in strategy.global_adapter.modules.values():
            assert not factors.lora_B.any()
            gram = factors.lora_A @ factors.lora_A.T
            torch.testing.assert_close(gram, torch.eye(MAX_RANK))

    def test_a_server_step_without_effect_is_refused(self):
        with pytest.raises(StrategyError, match="server_step"):
            strategy_named(
                "flexlora_change", "strategy.aggregation=state", "strategy.server_step=2"
            ).check([1, 2])


class TestChange:
    @pytest.mark.parametrize("step", [1.0, 0.4])
    def test_adds_the_mean_change_to_the_dense_matrix(self, step):
        strategy = strategy_named("flexlora_change", f"strategy.server_step={step}")
        in_svd_form(strategy)
        updates = [update_of(strategy, client, noise) for client in CLIENTS]

        after = merge(strategy, updates)

        for name, before in strategy.global_adapter.modules.items():
            change = sum(
                w * (dense(u.adapter.modules[name]) - dense(before.select(range(c.rank))))
                for w, c, u in zip(SHARES, CLIENTS, updates, strict=True)
            )
            expected = best_approximation(dense(before) + step * change, MAX_RANK)
            assert close(dense(after[name]), expected)

    def test_differs_from_state_under_mixed_ranks_only(self):
        state, change = (strategy_named(n) for n in ("flexlora", "flexlora_change"))
        for clients, same in ((CLIENTS, False), ([Client(4, 5, 0), Client(4, 9, 1)], True)):
            one, other = (
                merge(s, [update_of(s, client, noise) for client in clients])["dense"]
                for s in (state, change)
            )
            assert close(dense(one), dense(other)) is same


class TestCollapse:
    """Share of component i that is left after rounds in which clients return what they got."""

    ROUNDS = 3

    def shrinkage(self, strategy: HeterogeneousLora, measure) -> torch.Tensor:
        before = measure(strategy.global_adapter.modules["dense"])
        rounds(strategy, self.ROUNDS)
        return measure(strategy.global_adapter.modules["dense"]) / before

    @staticmethod
    def products(factors: LoraFactors) -> torch.Tensor:
        norms = factors.lora_B.norm(dim=0) * factors.lora_A.norm(dim=1)
        return norms.double()

    def test_flexlora_by_its_coverage(self):
        got = self.shrinkage(in_svd_form(strategy_named("flexlora")), singular_values)
        torch.testing.assert_close(got, COVERAGE**self.ROUNDS, rtol=1e-5, atol=0)

    def test_zero_padding_by_its_square(self):
        got = self.shrinkage(strategy_named("zero_padding"), self.products)
        torch.testing.assert_close(got, COVERAGE ** (2 * self.ROUNDS), rtol=1e-5, atol=0)

    def test_hetlora_by_the_square_of_its_norm_weights_coverage(self):
        strategy = strategy_named("hetlora")
        factors = strategy.global_adapter.modules["dense"]
        norms = torch.stack([dense(factors.select(range(c.rank))).norm() for c in CLIENTS])
        holds = torch.tensor([[c.rank > i for c in CLIENTS] for i in range(MAX_RANK)]).double()

        rounds(strategy, 1)

        got = self.products(strategy.global_adapter.modules["dense"]) / self.products(factors)
        torch.testing.assert_close(got, (holds @ norms / norms.sum()) ** 2, rtol=1e-5, atol=0)

    def test_hafl_not_at_all(self):
        got = self.shrinkage(strategy_named("hafl"), self.products)
        torch.testing.assert_close(got, torch.ones(MAX_RANK).double(), rtol=1e-5, atol=0)

    def test_flexlora_with_change_not_at_all(self):
        strategy = in_svd_form(strategy_named("flexlora_change"))
        got = self.shrinkage(strategy, singular_values)
        torch.testing.assert_close(got, torch.ones(MAX_RANK).double(), rtol=1e-5, atol=0)
