from dataclasses import replace

import pytest

from hafl_app.plan_parts.tail_pruning import TailPruning


class TestTailPruning:
    @pytest.mark.parametrize(
        ("decay", "min_rank", "rank", "start"),
        [
            (0.75, 1, 10, 7),  # floor(7.5)
            (0.75, 2, 2, 2),  # the floor on the rank: nothing is left to be tail
            (0.5, 4, 6, 4),  # min_rank above floor(3.0)
            (0.5, 8, 6, 6),  # min_rank above the rank itself
            (1.0, 1, 5, 5),
            (0.0, 1, 5, 1),
            (0.29, 1, 100, 29),  # 0.29 * 100 is 28.999...96 in binary
        ],
    )
    def test_start(self, decay, min_rank, rank, start):
        assert TailPruning(decay, weight=0.1, min_rank=min_rank).start(rank) == start

    def test_uploads_the_whole_module_or_all_before_the_tail(self):
        tail = TailPruning(0.75, weight=0.1, min_rank=2)

        assert tail.uploads(10) == {10, 7}
        assert tail.uploads(2) == {2}
        assert replace(tail, prune=False).uploads(10) == {10}
