import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.publishing.truncation import truncate_adapter

SHAPES = {"wide": (7, 5, 4), "tall": (9, 6, 3)}  # out, in, rank


def random_adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: LoraFactors(
            torch.randn(rank, width, generator=generator, dtype=torch.float64),
            torch.randn(height, rank, generator=generator, dtype=torch.float64),
        )
        for name, (height, width, rank) in SHAPES.items()
    }
    return Adapter(modules, {"bias": torch.arange(3.0)})


class TestTruncateAdapter:
    @given(rank=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
    def test_equals_the_dense_svd(self, rank, seed):
        adapter = random_adapter(seed)

        cut = truncate_adapter(adapter, rank)

        lost, total = 0.0, 0.0
        for name, factors in adapter.modules.items():
            dense = factors.delta_weight()
            left, values, right = torch.linalg.svd(dense, full_matrices=False)
            kept = min(rank, factors.rank)
            best = left[:, :kept] * values[:kept] @ right[:kept]
            assert cut.adapter.modules[name].rank == kept
            torch.testing.assert_close(cut.adapter.modules[name].delta_weight(), best)
            missing = (dense - best).square().sum().item()
            share = missing / dense.square().sum().item()
            assert cut.lost_by_module[name] == pytest.approx(share, abs=1e-9)
            lost, total = lost + missing, total + dense.square().sum().item()
        assert cut.lost == pytest.approx(lost / total, abs=1e-9)

    def test_the_first_components_would_lose_more(self):
        adapter = random_adapter(0)

        cut = truncate_adapter(adapter, 2)

        for name, factors in adapter.modules.items():
            energy = factors.delta_weight().square().sum()
            first = factors.delta_weight() - factors.select([0, 1]).delta_weight()
            assert cut.lost_by_module[name] < 0.9 * float(first.square().sum() / energy)

    def test_the_own_rank_loses_nothing(self):
        cut = truncate_adapter(random_adapter(1), 4)

        assert cut.lost == pytest.approx(0, abs=1e-12)
        assert cut.adapter.modules["tall"].rank == 3  # it has no fourth

    def test_the_head_stays(self):
        adapter = random_adapter(2)

        assert truncate_adapter(adapter, 2).adapter.head is adapter.head

    def test_an_adapter_without_effect_loses_nothing(self):
        adapter = random_adapter(2).map(lambda f: f.scale(0.0))

        assert truncate_adapter(adapter, 1).lost == 0

    @pytest.mark.parametrize("rank", [0, -1, 5])
    def test_refuses_other_ranks(self, rank):
        with pytest.raises(ValueError, match=f"^rank {rank}: expected 1 to 4, the rank of the ad"):
            truncate_adapter(random_adapter(0), rank)
