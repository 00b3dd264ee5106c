"""The parts of a comparison, each against numbers worked out by hand."""

import errno
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from hafl_app.config.compose import CONF, compose
from hafl_app.experiments.budget import equal_mean_bytes_rank, homogeneous_rank, mean_bytes
from hafl_app.experiments.command import parse_command
from hafl_app.experiments.comparison import Comparison
from hafl_app.experiments.lone_clients import alone_cells, beside_lone_clients
from hafl_app.experiments.results import make_row
from hafl_app.experiments.table import Provenance, markdown, write_tables
from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape
from hafl_app.metrics import ACCURACY, PERPLEXITY
from hafl_app.reports.curve import Curve, read_curve
from hafl_app.reports.statistics import Spread
from hafl_app.reports.tables import score, size
from hafl_app.run import build
from hafl_app.strategies.hafl import Hafl
from hafl_app.strategies.zero_padding import ZeroPadding
from hafl_app.tracking import jsonl
from hafl_app.wire.node_profile import NodeProfile

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# What an experiment cannot know: where the user keeps data and model.
GIVEN = {
    "dolly_stories260k": ("dataset.path=data", "model.path=model"),
    "dolly_smollm2": ("dataset.path=data",),
    "flexlora_natural_instructions": ("dataset.path=data",),
}
SHAPES = {"a": ModuleShape(7, 5), "b": ModuleShape(3, 11)}  # out + in: 12 and 14, together 26


def with_adapter(strategy):
    strategy.global_adapter = Adapter(
        {
            name: LoraFactors(
                torch.zeros(strategy.max_rank, shape.in_features),
                torch.zeros(shape.out_features, strategy.max_rank),
            )
            for name, shape in SHAPES.items()
        }
    )
    return strategy


class TestEqualMeanBytes:
    def test_prefixes_cost_their_rank_both_ways(self):
        # 4 bytes x (2 x 26 x mean rank 5 + 2 x 10 numbers of the head)
        found = mean_bytes(with_adapter(ZeroPadding(max_rank=8)), [2, 4, 9 - 1, 6], 10)
        assert found == 4 * (2 * 26 * 5 + 2 * 10)

    def test_freezing_sends_everything_down(self):
        found = mean_bytes(with_adapter(Hafl(max_rank=8, scheme="freezing")), [2, 4, 8, 6], 10)
        assert found == 4 * (26 * (8 + 5) + 2 * 10)

    @pytest.mark.parametrize(("ranks", "expected"), [([2, 4, 8, 8], 5), ([3, 3], 3), ([1, 2], 1)])
    def test_the_rank_is_the_mean_rounded_down(self, ranks, expected):
        budget = mean_bytes(with_adapter(ZeroPadding(max_rank=8)), ranks, 10)
        rank = homogeneous_rank(budget, SHAPES, 10)
        assert rank == expected
        assert 4 * (2 * 26 * rank + 2 * 10) <= budget < 4 * (2 * 26 * (rank + 1) + 2 * 10)

    def test_is_at_least_one(self):
        assert homogeneous_rank(0.0, SHAPES, 10) == 1

    @pytest.mark.parametrize("head", ["averaged", "frozen"])
    def test_of_settings(self, head):
        settings = compose(
            [
                "model=tiny_random",
                "dataset.num_train=200",
                "federation.num_clients=10",
                "strategy=zero_padding",
                f"model.head={head}",
            ]
        )
        assert equal_mean_bytes_rank(settings) == 5  # (3 x 2 + 3 x 4 + 4 x 8) / 10

    @pytest.mark.parametrize(
        "path", sorted((CONF / "strategy").glob("*.yaml")), ids=lambda p: p.stem
    )
    def test_every_method_can_say_what_it_sends(self, path):
        settings = compose([f"strategy={path.stem}"])
        strategy = with_adapter(build.strategy(settings))
        # Down everything that is held but a factor of the client's own, up at least one factor.
        plan = strategy.plan(NodeProfile(0, 2, 4, 1, "cpu"), 1)
        modules = plan.modules.values()
        own = any(module.own_lora_B for module in modules)
        down, up = (10 if own else 26) * 4, 10 * 4
        if cores := [module for module in modules if module.core]:  # the cores alone, both ways
            down = up = sum(module.core.size * len(module.trainable) for module in cores)
        assert mean_bytes(strategy, [4, 4], 10) >= 4 * (down + up + 2 * 10)


@pytest.mark.slow
class TestExperimentFiles:
    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_composes_and_every_method_composes_in_every_cell(self, name):
        chosen = [f"experiment={name}", *GIVEN.get(name, ())]
        settings = compose(chosen)
        if not settings.compare.methods:
            return
        comparison = Comparison.of(parse_command(chosen), Path("out"))
        assert settings.compare.baseline in settings.compare.methods
        for cell in comparison.cells:
            for its in comparison.methods.values():
                overrides = [*chosen, *comparison.cells[cell], *its.overrides]
                composed = compose(overrides)
                ranks = build.client_ranks(composed, composed.federation.num_clients)
                build.strategy(composed).check(ranks)
                assert max(ranks) == composed.lora.max_rank

    def test_the_rank_counts_are_the_papers(self):
        comparison = Comparison.of(parse_command(["experiment=mixed_ranks_banking77"]), Path("out"))
        counts = {}
        for cell, overrides in comparison.cells.items():
            settings = compose(["experiment=mixed_ranks_banking77", *overrides])
            ranks = build.client_ranks(settings, settings.federation.num_clients)
            counts[cell] = {rank: ranks.count(rank) for rank in sorted(set(ranks))}
        # LoRA-A2, arXiv:2410.22815, table 8; counts that give its upload totals.
        uniform = dict.fromkeys((2, 4, 8, 16, 32), 6)
        heavy_tail, normal = {2: 16, 4: 8, 8: 4, 16: 2}, {1: 3, 2: 7, 4: 10, 8: 7, 16: 3}
        assert counts == {
            f"{name}-{alpha}": expected
            for name, expected in (
                ("uniform", uniform),
                ("heavy_tail", heavy_tail),
                ("normal", normal),
            )
            for alpha in ("0.1", "0.01")
        }

    def test_a_head_alone_has_no_rounds_and_no_learning_rate(self):
        given = ["experiment=closed_form_banking77", "federation.num_rounds=4"]
        comparison = Comparison.of(parse_command(given), Path("out"))
        alone = ["head-alone", "class-means-alone"]
        assert not {job.method for job in comparison.tuning_jobs()} & set(alone)
        assert not any(comparison.only(method).searches for method in alone)
        assert comparison.only("hafl-closed-form").searches
        jobs = comparison.jobs(comparison.first_rates())
        rounds = {job.method: compose(job.overrides).federation.num_rounds for job in jobs}
        assert {m for m, number in rounds.items() if not number} == set(alone)
        assert rounds["hafl-closed-form"] == 4

    def test_a_cell_reaches_its_runs(self):
        command = parse_command(["experiment=hafl_newsgroups", "cells=clients10-0.01"])
        comparison = Comparison.of(command, Path("out"))
        overrides = comparison.overrides_of("clients10-0.01", "flexlora")
        settings = compose(overrides)
        assert settings.federation.num_clients == 10
        assert settings.partition.dirichlet_alpha == 0.01
        assert list(comparison.cells) == ["clients10-0.01"]


def curve(test, validation=None, step=1_000_000, metric=ACCURACY):
    sent = tuple(step * r for r in range(len(test)))
    sizes = sent, tuple(2 * s for s in sent)
    return Curve(tuple(test), tuple(validation or test), *sizes, metric=metric)


class TestPerplexity:
    def test_the_lowest_is_the_best(self):
        its = curve([60.0, 30.0, 25.0, 27.0], [61.0, 31.0, 28.0, 26.0], metric=PERPLEXITY)

        assert its.best_round == 3
        assert its.first_round_at(28.0) == 2
        assert its.first_round_at(20.0) is None
        assert curve([0.6, 0.3, 0.25]).best_round == 1  # of accuracies the highest

    def test_is_written_with_decimals(self):
        spread = Spread((25.0, 27.0))
        assert score(spread, PERPLEXITY) == "26.00 ± 1.41"
        assert score(Spread((0.25, 0.27)), ACCURACY) == "26.0 ± 1.4"

    def test_of_a_run_is_found_in_its_records(self, tmp_path):
        line = {"kind": "round", "bytes_down": 5, "bytes_up": 3}
        lines = [{**line, "metrics": {"test/perplexity": p, "test/loss": 1.0}} for p in (9.0, 7.5)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

        its = read_curve(tmp_path)

        assert (its.metric, its.test) == (PERPLEXITY, (9.0, 7.5))


def sliced(whole, **slices):
    at_rank = {int(name.lstrip("r")): score for name, score in slices.items()}
    return Curve((0.1, whole), (0.1, whole), (0, 1), (0, 2), at_rank=at_rank)


def provenance(seeds=(0, 1, 2), **more):
    return Provenance("t", "base", "command", "hardware", seeds, "tuning", "versions", **more)


SLICES = {
    0: sliced(0.5, r2=0.40, r4=0.5),
    1: sliced(0.5, r2=0.41, r4=0.5),
    2: sliced(0.5, r2=0.42, r4=0.5),
}
OTHER_SLICES = {
    2: sliced(0.6, r2=0.45, r4=0.6),
    1: sliced(0.6, r2=0.43, r4=0.6),
    0: sliced(0.6, r2=0.41, r4=math.nan),
}


class TestSlices:
    def row(self, method, runs, ranks=(2, 4), baseline_ranks=(2, 4)):
        return make_row(
            "", method, 0.1, 4, runs, SLICES, ranks=ranks, baseline_ranks=baseline_ranks
        )

    def test_differences_are_paired_by_seed_at_each_rank(self):
        found = self.row("other", OTHER_SLICES).at_rank_difference
        # Differences 1, 2 and 3 points: mean 2, sd 1, and t of 2 degrees of freedom 4.3027.
        assert sorted(found[2].each) == pytest.approx([0.01, 0.02, 0.03])
        half = 4.302653 * 0.01 / math.sqrt(3)
        assert found[2].interval == pytest.approx((0.02 - half, 0.02 + half))
        assert found[4].each == pytest.approx((0.1, 0.1))  # a slice without a score is no pair

    def test_stand_in_every_file(self, tmp_path):
        rows = [self.row("base", SLICES), self.row("other", OTHER_SLICES)]

        text = write_tables(tmp_path, rows, {}, provenance())

        assert "| other  | +2.0 (-0.5 to +4.5), 3 |" in text
        assert "at rank r: of the slice from that of base" in text
        kept = json.loads((tmp_path / "results.json").read_text())["rows"][1]
        assert kept["at_rank_2_difference_mean"] == pytest.approx(0.02)
        assert kept["at_rank_2_difference_low"] < 0 < kept["at_rank_2_difference_high"]
        assert kept["at_rank_4_each"] == [0.6, 0.6, None]  # JSON has no NaN
        line = pd.read_csv(tmp_path / "table.csv").iloc[1]
        assert line["at_rank_2_difference_high"] == kept["at_rank_2_difference_high"]

    def test_a_full_disk_leaves_the_table_of_before(self, tmp_path, monkeypatch):
        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        text = write_tables(tmp_path, [self.row("base", SLICES)], {}, provenance())
        monkeypatch.setattr(jsonl.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*table.md'"):
            write_tables(tmp_path, [self.row("other", OTHER_SLICES)], {}, provenance())
        assert (tmp_path / "table.md").read_text() == text

    def test_one_rank_for_all_has_none(self):
        assert self.row("one", OTHER_SLICES, ranks=(4, 4)).at_rank_difference == {}
        beside = [
            self.row("base", SLICES, (4, 4), (4, 4)),
            self.row("other", OTHER_SLICES, baseline_ranks=(4, 4)),
        ]
        assert beside[1].at_rank_difference == {}
        text = markdown(beside, {}, provenance())
        assert "difference at rank" not in text
        assert "all clients of the baseline train at one; compare.baseline= names another" in text


class TestRows:
    def test_rounds_and_megabytes_to_the_baselines_end(self):
        baseline = {0: curve([0.1, 0.4, 0.5]), 1: curve([0.1, 0.5, 0.6])}
        runs = {0: curve([0.1, 0.55, 0.4]), 1: curve([0.1, 0.3, 0.59])}

        row = make_row("c", "m", 0.01, 8, runs, baseline)

        assert row.rounds_to_baseline == Spread((1.0,))  # seed 1 stays below 0.6
        assert row.mb_to_baseline == Spread((3.0,))
        assert row.final == Spread((0.4, 0.59))
        assert row.mb_down == Spread((2.0, 2.0))
        assert row.mb_up == Spread((4.0, 4.0))

    def test_never_reached_is_no_number(self):
        row = make_row("c", "m", 0.01, 8, {0: curve([0.1, 0.2])}, {0: curve([0.1, 0.9])})
        assert row.rounds_to_baseline.each == ()
        assert math.isnan(row.rounds_to_baseline.mean)

    def test_the_first_best_round_after_training_counts(self):
        run = curve([0.1, 0.2, 0.3, 0.4], [0.9, 0.5, 0.7, 0.7])
        assert run.best_round == 2
        assert make_row("c", "m", 0.01, 8, {0: run}, {}).best == Spread((0.3,))

    def test_without_validation_the_last_round_is_best(self):
        assert curve([0.1, 0.2, 0.3], [math.nan] * 3).best_round == 2


class TestLoneClients:
    def test_others_stand_beside_those_of_the_method_that_measured_them(self):
        lone = {"rank": 2, "federated": 0.5, "alone": 0.3, "clients_alone": 1}
        ranks = {
            "a": {0: [lone], 1: [{**lone, "alone": 0.4}]},
            "b": {1: [{"rank": 2, "federated": 0.7}, {"rank": 4, "federated": 0.8}]},
        }

        shared = beside_lone_clients(ranks)

        assert shared["a"] == [[lone], [{**lone, "alone": 0.4}]]
        assert shared["b"] == [
            [{"rank": 2, "federated": 0.7, "alone": 0.4}, {"rank": 4, "federated": 0.8}]
        ]
        assert alone_cells("b", shared["b"]) == [["b", "2", "70.0", "40.0", "-"]]

    def test_methods_that_measured_their_own_keep_them(self):
        row = {"rank": 2, "federated": 0.5}
        rows = {method: {0: [{**row, "alone": alone}]} for method, alone in (("a", 1), ("b", 2))}

        assert beside_lone_clients(rows) == {m: [by[0]] for m, by in rows.items()}


@pytest.mark.parametrize(
    ("each", "text"),
    [((), "-"), ((0.5,), "50.0"), ((0.5, 0.52), "51.0 ± 1.4")],
)
def test_shares_are_in_percent(each, text):
    assert score(Spread(each), ACCURACY) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.nan, "-"), (0.0, "0"), (0.1234, "0.123"), (12.34, "12.3"), (1234, "1234")],
)
def test_size(value, text):
    assert size(value) == text
