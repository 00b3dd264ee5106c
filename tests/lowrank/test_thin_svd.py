import pytest
import torch
from lowrank_factories import IN, OUT, dense, random_factors, seeded

from hafl_app.lowrank import thin_svd
from hafl_app.lowrank.factors import LoraFactors
from hafl_app.lowrank.svd import WeightedStack, truncated_svd, truncated_svds
from hafl_app.lowrank.thin_svd import exact_triplets, leading_triplets


@pytest.fixture
def exact_calls(monkeypatch):
    """The stacks that went the slow, exact route."""
    calls = []

    def spy(lora_A, lora_B, rank):
        calls.append(lora_A)
        return exact_triplets(lora_A, lora_B, rank)

    monkeypatch.setattr(thin_svd, "exact_triplets", spy)
    return calls


def batch(*matrices):
    lora_A = torch.stack([factors.lora_A for factors in matrices])
    return lora_A, torch.stack([factors.lora_B for factors in matrices])


def best(factors, rank):
    U, S, Vh = torch.linalg.svd(dense(factors), full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def graded(rank, smallest, seed, out_features=60, in_features=40):
    """Factors whose lora_A has the condition number 1 / smallest."""
    generator = seeded(seed)
    rows = torch.randn(in_features, rank, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, torch.tensor(smallest).log10().item(), rank, dtype=torch.float64)
    lora_A = torch.linalg.qr(mixing).Q @ (scales[:, None] * torch.linalg.qr(rows).Q.T)
    lora_B = torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
    return LoraFactors(lora_A, lora_B)


# Rank below and above the smaller side; tall and wide.
SHAPES = [(4, OUT, IN), (4, IN, OUT), (9, OUT, IN), (9, IN, OUT), (15, IN, OUT)]


@pytest.mark.parametrize(("rank", "out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("kept", [1, 3, 20])
def test_every_shape_gives_the_best_approximation(rank, out_features, in_features, kept):
    matrices = [random_factors(rank, seed, out_features, in_features) for seed in range(3)]

    triplets = leading_triplets(*batch(*matrices), kept)

    for factors, (left, right) in zip(matrices, triplets, strict=True):
        assert left.shape[1] == right.shape[0] == min(kept, rank, OUT, IN)
        error = (left @ right - best(factors, kept)).norm()
        assert error < 1e-12 * dense(factors).norm()
        torch.testing.assert_close(right @ right.T, torch.eye(len(right)).double())
        assert left.norm(dim=0).diff().le(0).all()


@pytest.mark.parametrize(("rank", "out_features", "in_features"), SHAPES)
def test_ordinary_stacks_go_the_quick_route(rank, out_features, in_features, exact_calls):
    leading_triplets(*batch(random_factors(rank, 0, out_features, in_features)), 2)

    assert not exact_calls


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-4, 3e-5, 1e-5, 1e-7, 1e-12])
@pytest.mark.parametrize("kept", [4, 16])
@pytest.mark.parametrize(("out_features", "in_features"), [(60, 40), (16, 40), (40, 16)])
def test_ill_conditioned_stacks_stay_exact(smallest, kept, out_features, in_features):
    factors = graded(16, smallest, 1, out_features, in_features)

    result = truncated_svd(factors, kept)

    norm = dense(factors).norm()
    assert (dense(result) - best(factors, kept)).norm() < 1e-7 * norm
    torch.testing.assert_close(
        result.lora_A @ result.lora_A.T, torch.eye(kept).double(), rtol=0, atol=1e-9
    )


def test_what_would_lose_digits_goes_the_exact_route(exact_calls):
    leading_triplets(*batch(graded(16, 1e-12, seed=1)), 16)

    assert len(exact_calls) == 1


def test_a_stack_of_lower_rank_than_its_pieces_keeps_every_component_alive(exact_calls):
    piece, other = random_factors(3, 0, 60, 40), random_factors(2, 1, 60, 40)
    stack = WeightedStack().append(piece, 1.0).append(piece, 0.5).append(other, 0.25)
    factors = stack.factors()  # rank 8 on paper, 5 in truth

    result = truncated_svd(factors, 8)

    assert exact_calls
    assert result.lora_B.norm(dim=0).gt(0).tolist() == 5 * [True] + 3 * [False]
    torch.testing.assert_close(result.lora_A @ result.lora_A.T, torch.eye(8).double())
    torch.testing.assert_close(dense(result), dense(factors))


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("kept", [1, 4])
def test_pieces_that_nearly_cancel_stay_exact(size, kept):
    for seed in range(20):
        sent, step = random_factors(4, seed, 60, 40), random_factors(4, 100 + seed, 60, 40)
        trained = LoraFactors(sent.lora_A + size * step.lora_A, sent.lora_B + size * step.lora_B)
        stack = WeightedStack().append(trained, 1.0).append(sent, -1.0)

        result = truncated_svd(stack.factors(), kept)

        change = dense(trained) - dense(sent)
        U, S, Vh = torch.linalg.svd(change)
        expected = U[:, :kept] * S[:kept] @ Vh[:kept]
        assert (dense(result) - expected).norm() < 2e-9 * change.norm()


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("amplified", [False, True])
def test_float32_loses_no_more_than_rounding_where_rows_are_nearly_parallel(distance, amplified):
    """What differs between clients that started from one lora_A is a difference of like rows."""
    for seed in range(10):
        shared, own = random_factors(4, seed, 60, 40), random_factors(8, 100 + seed, 60, 40)
        lora_A = torch.cat([shared.lora_A, shared.lora_A]) + distance * own.lora_A
        lora_B = own.lora_B.clone()
        if amplified:  # so that the difference is as large as what is shared
            lora_B[:, 4:] = (shared.lora_B - distance * lora_B[:, :4]) / distance
            lora_B[:, :4] -= lora_B[:, 4:]
        factors = LoraFactors(lora_A.float(), lora_B.float())

        result = truncated_svd(factors, 8)

        assert (dense(result) - dense(factors)).norm() < 3e-6 * dense(factors).norm()
        rows = result.lora_A.double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(8).double(), rtol=0, atol=2e-5)


def test_one_bad_matrix_sends_no_other_the_slow_way(exact_calls):
    good, poor = random_factors(8, 0, 60, 40), graded(8, 1e-12, seed=2)

    triplets = leading_triplets(*batch(good, poor, good), 8)

    assert len(exact_calls) == 1
    torch.testing.assert_close(exact_calls[0], poor.lora_A)
    torch.testing.assert_close(triplets[0][0] @ triplets[0][1], dense(good))
    torch.testing.assert_close(triplets[1][0] @ triplets[1][1], dense(poor))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [4, 50])
def test_factors_must_be_finite(value, rank):
    good, broken = random_factors(rank, 0, 60, 40), random_factors(rank, 1, 60, 40)
    broken.lora_B[3, 1] = value

    with pytest.raises(torch.linalg.LinAlgError):
        leading_triplets(*batch(good, broken), 2)


def test_many_matrices_are_each_what_they_are_alone():
    matrices = [
        random_factors(4, 0, 60, 40, torch.float32),
        random_factors(4, 1, 40, 60),
        random_factors(4, 2, 60, 40, torch.float32),
        random_factors(6, 3, 60, 40, torch.float32),
        random_factors(0, 4, 60, 40),
    ]

    together = truncated_svds(matrices, 5)

    for result, factors in zip(together, matrices, strict=True):
        alone = truncated_svd(factors, 5)
        assert result.lora_A.dtype == factors.lora_A.dtype
        torch.testing.assert_close(result.lora_A, alone.lora_A)
        torch.testing.assert_close(result.lora_B, alone.lora_B)


def test_matrices_of_one_shape_are_decomposed_in_one_call(monkeypatch):
    sizes = []

    def spy(lora_A, lora_B, rank):
        sizes.append(len(lora_A))
        return leading_triplets(lora_A, lora_B, rank)

    monkeypatch.setattr("hafl_app.lowrank.svd.leading_triplets", spy)
    tall = [random_factors(4, seed, 60, 40) for seed in range(3)]
    wide = [random_factors(4, seed, 40, 60) for seed in range(2)]

    truncated_svds([tall[0], wide[0], tall[1], wide[1], tall[2]], 3)

    assert sizes == [3, 2]
