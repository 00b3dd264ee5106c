import pytest
import torch
from lowrank_factories import IN, OUT, dense, random_factors

from hafl_app.lowrank import product_sum
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.product_sum import ProductSum, truncated_sums
from hafl_app.lowrank.svd import truncated_svd

WEIGHTS = [3.0, 0.5, -1.25, 7.0, 0.125, 2.0, -4.0, 1.5]
PIECES = [random_factors(1 + number % 3, number) for number in range(len(WEIGHTS))]
EXPECTED = sum(weight * dense(factors) for factors, weight in zip(PIECES, WEIGHTS, strict=True))


def total(pieces=PIECES, weights=WEIGHTS):
    one = ProductSum()
    for factors, weight in zip(pieces, weights, strict=True):
        one = one.add(factors, weight)
    return one


def error(factors):
    """Return the error of an approximation, in the Frobenius norm."""
    return torch.linalg.matrix_norm(EXPECTED - dense(factors)).item()


def least_error(rank):
    return torch.linalg.svdvals(EXPECTED)[rank:].square().sum().sqrt().item()


class TestProductSum:
    def test_is_exact_on_either_side_of_the_switch(self):
        for number in range(1, len(PIECES) + 1):
            one = total(PIECES[:number], WEIGHTS[:number])
            expected = sum(
                w * dense(f) for f, w in zip(PIECES[:number], WEIGHTS[:number], strict=True)
            )
            torch.testing.assert_close(one.matrix(), expected, rtol=0, atol=1e-12)
            summed = sum(factors.rank for factors in PIECES[:number])
            assert (one.dense is None) == (summed <= min(OUT, IN))

    def test_keeps_no_more_than_the_matrix_and_a_block(self, monkeypatch):
        monkeypatch.setattr(product_sum, "_BLOCK_RANK", 4)
        one = ProductSum()
        for number in range(60):
            one = one.add(random_factors(2, number), 1.0)
            assert one.stack.rank <= (min(OUT, IN) if one.dense is None else 4)

    def test_a_share_switches_earlier_to_the_same_sum(self):
        one = ProductSum(0.5).add(PIECES[0], 2.0).add(PIECES[1], 3.0).add(PIECES[2], 0.5)

        assert one.dense is not None
        expected = 2 * dense(PIECES[0]) + 3 * dense(PIECES[1]) + 0.5 * dense(PIECES[2])
        torch.testing.assert_close(one.matrix(), expected, rtol=0, atol=1e-12)

    def test_single_precision_pieces_are_summed_in_double(self):
        big, small = (random_factors(4, seed, dtype=torch.float32) for seed in (1, 2))
        pieces, weights = [big, small, big, small], [1.0, 1.0, -1.0, 0.0]

        one = total(pieces, weights)

        torch.testing.assert_close(one.matrix(), dense(small), rtol=0, atol=1e-12)

    def test_does_not_keep_a_whole_message_alive(self):
        message = torch.randn(10_000)
        factors = LoraFactors(message[: 2 * IN].view(2, IN), message[-2 * OUT :].view(OUT, 2))

        (kept, _), *_ = ProductSum().add(factors, 1.0).stack.pieces

        assert kept.lora_A.untyped_storage().nbytes() == 2 * IN * 4
        assert torch.equal(kept.lora_B, factors.lora_B)

    @pytest.mark.parametrize("count", [2, len(PIECES)])
    def test_scaling(self, count):
        one, before = total(PIECES[:count], WEIGHTS[:count]), total(PIECES[:count], WEIGHTS[:count])

        torch.testing.assert_close(one.scale(0.3).matrix(), 0.3 * before.matrix())

    @pytest.mark.parametrize("count", [2, len(PIECES)])
    def test_times_a_matrix(self, count):
        one, right = total(PIECES[:count], WEIGHTS[:count]), random_factors(3, 77).lora_A.T

        torch.testing.assert_close(one.times(right), one.matrix() @ right.double())
        with pytest.raises(ValueError, match="an empty sum has no size"):
            ProductSum().times(right)

    def test_a_wrong_weight_is_refused(self):
        with pytest.raises(ValueError, match="finite"):
            ProductSum().add(PIECES[0], float("nan"))


class TestTruncation:
    @pytest.mark.parametrize("rank", [1, 3, 6])
    def test_of_a_dense_sum_is_the_best_approximation(self, rank):
        assert total().dense is not None

        (factors,) = truncated_sums([total()], rank, torch.float64)

        assert factors.rank == rank
        assert error(factors) == pytest.approx(least_error(rank), abs=1e-10)
        identity = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(factors.lora_A @ factors.lora_A.T, identity, atol=1e-9, rtol=0)

    def test_of_stacks_and_dense_sums_side_by_side_keeps_their_places(self):
        few, many = total(PIECES[:2], WEIGHTS[:2]), total()

        stacked, summed, again = truncated_sums([few, many, few], 3, torch.float32)

        expected = truncated_svd(few.stack.factors(), 3)
        torch.testing.assert_close(dense(stacked), dense(expected), atol=1e-5, rtol=0)
        torch.testing.assert_close(dense(stacked), dense(again))
        assert error(summed) == pytest.approx(least_error(3), abs=1e-5)
        assert {f.lora_A.dtype for f in (stacked, summed)} == {torch.float32}

    def test_a_dense_sum_of_low_rank_has_orthonormal_rows_and_no_noise(self):
        pieces = [random_factors(2, 5)] * 8  # of rank 2, in a sum of 16 summands' ranks

        (factors,) = truncated_sums([total(pieces, [1.0] * 8)], 5, torch.float64)

        assert torch.count_nonzero(factors.lora_B[:, 2:]) == 0
        identity = torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(factors.lora_A @ factors.lora_A.T, identity, atol=1e-9, rtol=0)
        torch.testing.assert_close(dense(factors), 8 * dense(pieces[0]), atol=1e-9, rtol=0)

    def test_an_ill_conditioned_dense_sum(self):
        scales = [1.0, 1e-3, 1e-6, 1e-9, 1e-11, 1e-13, 1e-14, 1e-14]

        (factors,) = truncated_sums([total(weights=scales)], 6, torch.float64)

        identity = torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(factors.lora_A @ factors.lora_A.T, identity, atol=1e-9, rtol=0)
        matrix = total(weights=scales).matrix()
        left = torch.linalg.matrix_norm(matrix - dense(factors))
        assert left < 1e-6 * torch.linalg.matrix_norm(matrix)
