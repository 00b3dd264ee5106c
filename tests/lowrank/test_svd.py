import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lowrank_factories import IN, OUT, assert_same_bits, copy, dense, random_factors, seeded
from torch import nn

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.svd import WeightedStack, singular_values, tail_energy, truncated_svd

SEEDS = st.integers(0, 2**32 - 1)
WEIGHTS = st.floats(-3, 3).filter(lambda weight: abs(weight) > 0.01)
PIECES = st.lists(st.tuples(st.integers(1, 5), WEIGHTS), min_size=1, max_size=4)


def stack_of(pieces, seed, dtype=torch.float64):
    stack = WeightedStack()
    for number, (rank, weight) in enumerate(pieces):
        stack = stack.append(random_factors(rank, seed + number, dtype=dtype), weight)
    return stack


def dense_sum(stack):
    return sum(weight * dense(factors) for factors, weight in stack.pieces)


def assert_orthonormal_rows(lora_A, atol):
    gram = lora_A.double() @ lora_A.double().T
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=atol)


class TestWeightedStack:
    @given(pieces=PIECES, seed=SEEDS)
    def test_factors_are_the_weighted_sum(self, pieces, seed):
        stack = stack_of(pieces, seed)

        factors = stack.factors()

        assert factors.rank == sum(rank for rank, _ in pieces)
        torch.testing.assert_close(dense(factors), dense_sum(stack), rtol=0, atol=1e-11)
        assert stack.total_weight == pytest.approx(sum(weight for _, weight in pieces))

    def test_splits_the_weight_evenly_and_the_sign_goes_to_lora_b(self):
        piece = random_factors(2, 0)

        factors = WeightedStack().append(piece, -9.0).factors()

        torch.testing.assert_close(factors.lora_A, 3 * piece.lora_A)
        torch.testing.assert_close(factors.lora_B, -3 * piece.lora_B)

    def test_append_leaves_the_stack_as_it_was(self):
        first, second = random_factors(2, 0), random_factors(3, 1)
        stack = WeightedStack().append(first, 2.0)

        stack.append(second, 0.5).factors()

        assert stack.total_weight == 2.0
        assert len(stack.pieces) == 1
        assert_same_bits(first, random_factors(2, 0))

    def test_pieces_of_rank_and_weight_zero_add_nothing(self):
        piece = random_factors(2, 0)
        stack = WeightedStack().append(piece, 2.0).append(random_factors(3, 1), 0.0)

        stack = stack.append(piece.select(()), 1.5)

        assert stack.total_weight == 3.5
        torch.testing.assert_close(dense(stack.factors()), 2 * dense(piece))

    def test_an_empty_stack_has_no_factors(self):
        assert WeightedStack().total_weight == 0
        with pytest.raises(ValueError, match="empty stack"):
            WeightedStack().factors()

    @pytest.mark.parametrize(
        "other",
        [
            random_factors(2, 1, out_features=OUT + 1),
            random_factors(2, 1, in_features=IN + 1),
            random_factors(2, 1, dtype=torch.float32),
        ],
    )
    def test_pieces_that_do_not_fit_are_refused(self, other):
        with pytest.raises(ValueError, match="in the stack"):
            WeightedStack().append(random_factors(2, 0), 1.0).append(other, 1.0)

    @pytest.mark.parametrize("weight", [math.nan, math.inf])
    def test_weights_must_be_finite(self, weight):
        with pytest.raises(ValueError, match="finite"):
            WeightedStack().append(random_factors(2, 0), weight)


class TestTruncatedSvd:
    # Multiplied out in float32, one row of this is off by 1.2e-6.
    @example(pieces=[(2, 1.0), (2, 1.0), (2, 1.0)], target=6, seed=10928)
    @given(pieces=PIECES, target=st.integers(1, 12), seed=SEEDS)
    def test_is_the_best_approximation_of_the_dense_sum(self, pieces, target, seed):
        stack = stack_of(pieces, seed, dtype=torch.float32)
        matrix = dense(stack.factors())
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        best = U[:, :target] * S[:target] @ Vh[:target]

        result = truncated_svd(stack.factors(), target)

        # Eckart-Young names the error, which unlike the matrix is unique.
        error = (matrix - dense(result)).norm()
        torch.testing.assert_close(error, (matrix - best).norm(), rtol=0, atol=1e-6 * S[0].item())
        values = result.lora_B.double().norm(dim=0)
        kept = min(target, len(S))
        torch.testing.assert_close(values[:kept], S[:kept], rtol=0, atol=1e-6 * S[0].item())
        assert_orthonormal_rows(result.lora_A[:IN], atol=1e-6)

    def test_equals_the_dense_svd(self):
        stack = stack_of([(4, 0.5), (1, 2.0), (3, -1.5)], seed=1, dtype=torch.float32)
        U, S, Vh = torch.linalg.svd(dense_sum(stack))
        best = U[:, :3] * S[:3] @ Vh[:3]

        result = truncated_svd(stack.factors(), 3)

        torch.testing.assert_close(dense(result), best, rtol=0, atol=1e-6 * S[0].item())

    @given(rank=st.integers(1, 12), target=st.integers(1, 12), seed=SEEDS)
    def test_error_is_the_discarded_spectrum(self, rank, target, seed):
        factors = random_factors(rank, seed)

        error = (dense(factors) - dense(truncated_svd(factors, target))).norm()

        spectrum = torch.linalg.svdvals(dense(factors))
        torch.testing.assert_close(error, spectrum[target:].norm(), atol=1e-9, rtol=0)

    @given(rank=st.integers(0, 9), target=st.integers(1, 12), seed=SEEDS)
    def test_has_exactly_the_rank_asked_for(self, rank, target, seed):
        result = truncated_svd(random_factors(rank, seed), target)

        assert result.rank == target
        true_rank = min(rank, IN)
        assert not result.lora_B[:, true_rank:].any()
        assert result.lora_B[:, :true_rank].norm(dim=0).gt(0).all()
        for start in range(0, target, IN):
            assert_orthonormal_rows(result.lora_A[start : start + IN], atol=1e-12)

    @given(seed=SEEDS)
    def test_largest_entry_of_every_column_is_positive(self, seed):
        result = truncated_svd(random_factors(4, seed), 4)

        largest = result.lora_B.gather(0, result.lora_B.abs().argmax(0, keepdim=True))
        assert largest.gt(0).all()
        assert result.lora_B.norm(dim=0).diff().le(0).all()

    def test_order_of_the_pieces_does_not_matter(self):
        pieces = stack_of([(4, 0.5), (1, 2.0), (3, -1.5)], seed=1).pieces

        forward = truncated_svd(WeightedStack(pieces).factors(), 5)
        backward = truncated_svd(WeightedStack(pieces[::-1]).factors(), 5)

        torch.testing.assert_close(forward.lora_A, backward.lora_A)
        torch.testing.assert_close(forward.lora_B, backward.lora_B)

    @given(rank=st.integers(1, 4), copies=st.integers(2, 4), target=st.integers(1, IN), seed=SEEDS)
    def test_rank_deficient_stack(self, rank, copies, target, seed):
        piece = random_factors(rank, seed, dtype=torch.float32)
        stack = WeightedStack()
        for number in range(copies):
            stack = stack.append(piece, 4.0**number)  # powers of 4: sqrt is exact

        result = truncated_svd(stack.factors(), target)

        assert int(result.lora_B.norm(dim=0).count_nonzero()) == min(rank, target)
        assert_orthonormal_rows(result.lora_A, atol=1e-6)

    @given(decay=st.integers(1, 4), target=st.integers(1, IN), seed=SEEDS)
    def test_ill_conditioned_stack(self, decay, target, seed):
        factors = random_factors(5, seed)
        falling = 10.0 ** -(decay * torch.arange(5, dtype=torch.float64))
        # Columns fall as rows rise for two components: their product is of the usual size.
        falling_rows = falling.clone()
        falling_rows[3:] = 1 / falling[3:]
        steep = LoraFactors(factors.lora_A * falling_rows[:, None], factors.lora_B * falling)

        result = truncated_svd(steep, target)

        spectrum = torch.linalg.svdvals(dense(steep))
        error = (dense(steep) - dense(result)).norm()
        torch.testing.assert_close(
            error, spectrum[target:].norm(), rtol=0, atol=1e-12 * spectrum[0].item()
        )
        assert_orthonormal_rows(result.lora_A, atol=1e-12)

    @pytest.mark.parametrize("rank", [2, IN + 2])  # stacked and dense route
    def test_pieces_that_cancel_leave_nothing(self, rank):
        piece = random_factors(rank, 0, dtype=torch.float32)

        result = truncated_svd(WeightedStack().append(piece, 3.0).append(piece, -3.0).factors(), IN)

        assert not result.lora_B.any()
        assert_orthonormal_rows(result.lora_A, atol=1e-6)

    @pytest.mark.parametrize("target", [1, 3, IN, IN + 2])
    def test_zero_stack_can_still_learn(self, target):
        zero = LoraFactors(torch.zeros(3, IN), torch.zeros(OUT, 3))

        result = truncated_svd(WeightedStack().append(zero, 2.0).factors(), target)

        assert not result.lora_B.any()
        assert_orthonormal_rows(result.lora_A[:IN], atol=1e-6)
        assert_orthonormal_rows(result.lora_A[IN:], atol=1e-6)

    def test_padding_follows_the_generator(self):
        factors = random_factors(2, 0)

        first = truncated_svd(factors, 4, generator=seeded(1))

        assert_same_bits(first, truncated_svd(factors, 4, generator=seeded(1)))
        assert_same_bits(truncated_svd(factors, 4), truncated_svd(factors, 4))
        other = truncated_svd(factors, 4, generator=seeded(2))
        assert torch.equal(first.lora_A[:2], other.lora_A[:2])
        assert not torch.isclose(first.lora_A[2:], other.lora_A[2:]).any()

    def test_change_aggregation_keeps_what_clients_were_not_sent(self):
        """M + sum_k w_k (B_k A_k - sent_k), with sent_k the first r_k components of M."""
        previous = truncated_svd(random_factors(5, 0), 5)
        expected, stack = dense(previous), WeightedStack().append(previous, 1.0)
        for client, (rank, weight) in enumerate([(1, 0.2), (2, 0.3), (4, 0.5)]):
            sent = previous.select(range(rank))
            trained = LoraFactors(sent.lora_A + 0.1, sent.lora_B * (1.1 + client))
            stack = stack.append(trained, weight).append(sent, -weight)
            expected = expected + weight * (dense(trained) - dense(sent))

        result = truncated_svd(stack.factors(), IN)

        assert stack.total_weight == pytest.approx(1.0)
        torch.testing.assert_close(dense(result), expected, rtol=0, atol=1e-12)

    def test_change_aggregation_without_change_keeps_the_adapter(self):
        previous = truncated_svd(random_factors(5, 0), 5)
        sent = previous.select(range(2))
        stack = WeightedStack().append(previous, 1.0).append(sent, 0.7).append(sent, -0.7)

        result = truncated_svd(stack.factors(), 5)

        torch.testing.assert_close(result.lora_A, previous.lora_A)
        torch.testing.assert_close(result.lora_B, previous.lora_B)

    @pytest.mark.parametrize("rank", [3, IN + 2])
    def test_arguments_are_not_changed(self, rank):
        factors = random_factors(rank, 0)
        before = copy(factors)

        truncated_svd(factors, 4)
        singular_values(factors)
        tail_energy(factors, 1)

        assert_same_bits(factors, before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("rank", [2, IN + 2])
    def test_dtype_is_kept(self, dtype, rank):
        factors = random_factors(rank, 0, dtype=dtype)

        result = truncated_svd(factors, 4)

        assert result.lora_A.dtype == result.lora_B.dtype == dtype
        assert singular_values(factors).dtype == torch.float64

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_device_is_kept(self):
        factors = random_factors(3, 0, dtype=torch.float32)
        on_gpu = LoraFactors(factors.lora_A.cuda(), factors.lora_B.cuda())

        result = truncated_svd(on_gpu, 5)

        assert result.lora_A.is_cuda
        assert result.lora_B.is_cuda
        torch.testing.assert_close(dense(result).cpu(), dense(factors), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("rank", [0, -1])
    def test_rank_must_be_positive(self, rank):
        with pytest.raises(ValueError, match="at least 1"):
            truncated_svd(random_factors(2, 0), rank)

    @pytest.mark.parametrize("rank", [2, IN + 2])
    def test_factors_must_be_finite(self, rank):
        factors = random_factors(rank, 0)
        factors.lora_A[0, 0] = math.nan

        with pytest.raises(torch.linalg.LinAlgError):
            truncated_svd(factors, 2)


class TestSpectrum:
    @given(rank=st.integers(0, 12), seed=SEEDS)
    def test_singular_values_are_those_of_the_dense_matrix(self, rank, seed):
        factors = random_factors(rank, seed, dtype=torch.float32)
        count = min(rank, OUT, IN)

        values = singular_values(factors)

        assert values.shape == (count,)
        expected = torch.linalg.svdvals(dense(factors))[:count]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)

    def test_zero_singular_values_are_exactly_zero(self):
        piece = random_factors(2, 0)
        stack = WeightedStack().append(piece, 1.0).append(piece, 0.3)

        assert singular_values(stack.factors())[2:].tolist() == [0.0, 0.0]

    @given(rank=st.integers(1, 12), above=st.integers(0, 12), seed=SEEDS)
    def test_tail_energy_is_the_share_of_the_discarded_spectrum(self, rank, above, seed):
        factors = random_factors(rank, seed)

        energy = torch.linalg.svdvals(dense(factors)).square()

        expected = energy[above:].sum() / energy.sum()
        torch.testing.assert_close(tail_energy(factors, above), expected, rtol=0, atol=1e-12)

    def test_tail_energy_of_nothing_is_zero(self):
        zero = LoraFactors(torch.zeros(3, IN), torch.zeros(OUT, 3))

        assert tail_energy(zero, 0) == 0
        assert tail_energy(zero.select(()), 0) == 0

    def test_rank_must_not_be_negative(self):
        with pytest.raises(ValueError, match="negative"):
            tail_energy(random_factors(2, 0), -1)


class TestAgainstPeft:
    """PEFT's ``add_weighted_adapter(combination_type="svd")`` on adapters of mixed rank."""

    RANKS = {"first": 2, "second": 3, "third": 5}  # noqa: RUF012
    LORA_ALPHA = 8.0
    WEIGHTS = [0.5, 1.25, -0.75]  # noqa: RUF012
    TARGET = 4

    @pytest.fixture
    def model(self):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        base = nn.ModuleDict({"query": nn.Linear(IN, OUT), "dense": nn.Linear(13, 9)})
        configs = {
            name: peft.LoraConfig(
                r=rank,
                lora_alpha=self.LORA_ALPHA,
                target_modules=["query", "dense"],
                init_lora_weights=False,
            )
            for name, rank in self.RANKS.items()
        }
        model = peft.get_peft_model(base, configs["first"], adapter_name="first")
        for name in ("second", "third"):
            model.add_adapter(name, configs[name])
        model.add_weighted_adapter(
            list(self.RANKS), self.WEIGHTS, "merged", combination_type="svd", svd_rank=self.TARGET
        )
        return model.base_model.model

    @pytest.mark.parametrize("module", ["query", "dense"])
    def test_same_merged_adapter(self, model, module):
        layer, stack = model[module], WeightedStack()
        for (name, rank), weight in zip(self.RANKS.items(), self.WEIGHTS, strict=True):
            lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
            factors = LoraFactors(lora_A.detach(), lora_B.detach()).scale(self.LORA_ALPHA / rank)
            stack = stack.append(factors, weight)

        result = truncated_svd(stack.factors(), self.TARGET)

        merged = layer.get_delta_weight("merged").detach()
        torch.testing.assert_close(result.delta_weight(), merged, rtol=0, atol=1e-5)
        peft_A = layer.lora_A["merged"].weight.detach()
        torch.testing.assert_close(result.lora_A.abs(), peft_A.abs(), rtol=0, atol=1e-4)
