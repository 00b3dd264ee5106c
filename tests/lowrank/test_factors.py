import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowrank_factories import IN, OUT, assert_same_bits, copy, dense, random_factors, seeded

from hafl_app.lowrank.factors import (
    INITIAL_ROW_NORM,
    Adapter,
    LoraFactors,
    ModuleShape,
    initial_adapter,
    orthogonal_rows,
)

RANK = 3


class TestLoraFactors:
    def test_knows_its_sizes(self):
        factors = random_factors(RANK, 0)

        assert (factors.rank, factors.in_features, factors.out_features) == (RANK, IN, OUT)
        assert factors.delta_weight().shape == (OUT, IN)
        assert ModuleShape.of(factors) == ModuleShape(out_features=OUT, in_features=IN)

    def test_is_the_sum_of_its_components(self):
        factors = random_factors(RANK, 0)

        parts = sum(dense(factors.select([i])) for i in range(RANK))

        torch.testing.assert_close(parts, dense(factors))

    def test_disagreeing_ranks_are_refused(self):
        with pytest.raises(ValueError, match=r"\(3, 7\).*\(11, 2\) disagree on the rank"):
            LoraFactors(torch.zeros(3, IN), torch.zeros(OUT, 2))

    def test_vectors_are_refused(self):
        with pytest.raises(ValueError, match="must be matrices"):
            LoraFactors(torch.zeros(IN), torch.zeros(OUT, 1))

    def test_select_keeps_the_order_and_copies(self):
        factors = random_factors(RANK, 0)

        chosen = factors.select([2, 0])

        assert torch.equal(chosen.lora_A, factors.lora_A[[2, 0]])
        assert torch.equal(chosen.lora_B, factors.lora_B[:, [2, 0]])
        chosen.lora_A.zero_()
        assert_same_bits(factors, random_factors(RANK, 0))

    def test_select_nothing(self):
        nothing = random_factors(RANK, 0).select(())

        assert nothing.rank == 0
        assert torch.equal(nothing.delta_weight(), torch.zeros(OUT, IN, dtype=torch.float64))

    def test_replace_undoes_select(self):
        factors, other = random_factors(RANK, 0), random_factors(2, 1)
        before = copy(factors)

        replaced = factors.replace([2, 0], other)

        assert_same_bits(replaced.select([2, 0]), other)
        assert_same_bits(replaced.select([1]), factors.select([1]))
        assert_same_bits(factors, before)

    def test_scale_scales_the_product_once(self):
        factors = random_factors(RANK, 0)

        torch.testing.assert_close(dense(factors.scale(-2.5)), -2.5 * dense(factors))

    @given(rank=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
    def test_norm_is_that_of_the_dense_matrix(self, rank, seed):
        factors = random_factors(rank, seed, dtype=torch.float32)

        torch.testing.assert_close(factors.norm(), dense(factors).norm(), rtol=1e-9, atol=0)

    def test_padding_adds_zero_components_behind(self):
        factors = LoraFactors(torch.randn(2, 5), torch.randn(7, 2))

        padded = factors.padded(4)

        assert torch.equal(padded.select([0, 1]).lora_A, factors.lora_A)
        assert torch.equal(padded.select([0, 1]).lora_B, factors.lora_B)
        assert not padded.lora_A[2:].any()
        assert not padded.lora_B[:, 2:].any()
        assert torch.allclose(padded.delta_weight(), factors.delta_weight())

    def test_padding_drops_nothing(self):
        with pytest.raises(ValueError, match=r"^rank 1: the factors have 2 components$"):
            LoraFactors(torch.randn(2, 5), torch.randn(7, 2)).padded(1)


class TestAdapter:
    def test_map_keeps_names_and_head(self):
        head = {"weight": torch.ones(2)}
        adapter = Adapter({"query": random_factors(RANK, 0)}, head)

        doubled = adapter.map(lambda factors: factors.scale(2.0))

        torch.testing.assert_close(
            dense(doubled.modules["query"]), 2 * dense(adapter.modules["query"])
        )
        assert doubled.head is head
        assert adapter.with_head({}).head == {}

    def test_counts_the_parameters_of_its_factors(self):
        adapter = Adapter({"query": random_factors(RANK, 0), "value": random_factors(2, 0)})

        assert adapter.num_parameters == (RANK + 2) * (OUT + IN)


class TestTensors:
    def test_no_two_share_a_name_whatever_modules_and_head_are_called(self):
        modules = {"a": random_factors(2, 0), "lora_A/a": random_factors(RANK, 1, 5, 13)}
        head = {"a": torch.arange(4.0), "lora_B/a": torch.ones(2, 5)}

        tensors = Adapter(modules, head).tensors()

        names = {f"{p}/{n}" for p in ("lora_A", "lora_B") for n in modules}
        assert tensors.keys() == names | {f"head/{n}" for n in head}
        assert tensors["lora_B/lora_A/a"] is modules["lora_A/a"].lora_B
        again = Adapter.from_tensors(tensors)
        assert again.head == head
        assert list(again.modules) == list(modules)
        for name, factors in modules.items():
            assert_same_bits(again.modules[name], factors)


class TestInitialAdapter:
    SHAPES = {"query": ModuleShape(OUT, IN), "dense": ModuleShape(5, 13)}  # noqa: RUF012

    @given(rank=st.integers(1, 3 * IN), seed=st.integers(0, 2**32 - 1))
    def test_rows_are_orthogonal_in_blocks(self, rank, seed):
        rows = orthogonal_rows(rank, IN, seeded(seed)).double()

        for start in range(0, rank, IN):
            block = rows[start : start + IN]
            expected = INITIAL_ROW_NORM**2 * torch.eye(len(block), dtype=torch.float64)
            torch.testing.assert_close(block @ block.T, expected, rtol=0, atol=1e-6)

    def test_has_no_effect_and_can_learn(self):
        adapter = initial_adapter(self.SHAPES, RANK, seed=3)

        for name, factors in adapter.modules.items():
            assert ModuleShape.of(factors) == self.SHAPES[name]
            assert not factors.lora_B.any()
            assert factors.lora_A.norm(dim=1).min() > 0

    def test_depends_on_the_seed_and_not_on_the_order(self):
        adapter = initial_adapter(self.SHAPES, RANK, seed=3)
        same = initial_adapter(dict(reversed(self.SHAPES.items())), RANK, seed=3)
        other = initial_adapter(self.SHAPES, RANK, seed=4)

        for name, factors in adapter.modules.items():
            assert_same_bits(factors, same.modules[name])
            assert not torch.equal(factors.lora_A, other.modules[name].lora_A)
