"""The server's step under central privacy, and what methods and settings it can cover."""

from dataclasses import replace

import pytest
import torch
from driving import MAX_RANK, Client, merge, noise, strategy_named, update_of

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.privacy.mechanism import NoiseSource, PrivacyError, PrivacyOptions
from hafl_app.server.central_privacy import (
    next_adapter,
    sum_of_changes,
    trainable_counts,
)
from hafl_app.server.compatibility import private_division
from hafl_app.server.method import StrategyError
from hafl_app.server.update import ClientUpdate
from hafl_app.wire.node_profile import NodeProfile

NOISE = NoiseSource("a key for tests")
# Next to no noise, and no clipping: what is left is the step's arithmetic.
BARE = PrivacyOptions("central_dp", clip_norm=1e6, noise_multiplier=1e-15)
RANKS = (1, 2, 3, 2, 1)  # component 3 of MAX_RANK = 4 belongs to no client
COUNTS = torch.tensor([5.0, 3.0, 1.0, 0.0], dtype=torch.float64)
CLIENTS = [Client(rank, 10 + 7 * i, i) for i, rank in enumerate(RANKS)]


def flat(value: Adapter) -> torch.Tensor:
    factors = [t.flatten() for f in value.modules.values() for t in (f.lora_A, f.lora_B)]
    return torch.cat([*factors, *(t.flatten() for t in value.head.values())]).double()


def changed_head(update: ClientUpdate) -> ClientUpdate:
    """Let training move the head too, each client by another amount."""
    head = {n: t + 0.1 * (1 + update.partition_id) for n, t in update.adapter.head.items()}
    return replace(update, adapter=update.adapter.with_head(head))


class Round:
    """A round of mixed ranks: who is registered, and the updates of those who came."""

    def __init__(self, name="zero_padding", came=(0, 1, 2), *overrides):
        self.strategy = strategy_named(name, *overrides)
        plans = [self.strategy.plan(client.profile, 1) for client in CLIENTS]
        self.previous = self.strategy.global_adapter
        self.counts = trainable_counts(plans, self.previous)
        self.updates = [changed_head(update_of(self.strategy, CLIENTS[i], noise)) for i in came]

    def step(self, division, options=BARE, rate=0.5, updates=None, server_round=1):
        return next_adapter(
            self.previous,
            self.updates if updates is None else updates,
            self.counts,
            len(CLIENTS),
            rate,
            options,
            NOISE,
            server_round,
            division,
        )


class TestStep:
    def test_counts_are_of_the_registered_and_not_of_those_who_came(self):
        for counts in Round().counts.values():
            assert torch.equal(counts, COUNTS.expand(2, -1))

    def test_contributors_divide_by_the_expected_number_of_them(self):
        happened = Round()
        after = happened.step("contributors").modules["query"]

        before = happened.previous.modules["query"]
        changes = [u.adapter.modules["query"].lora_A.double() for u in happened.updates]
        changes = [c - before.lora_A[: len(c)].double() for c in changes]
        # Clients of rank 1, 2 and 3 came; 5, 3 and 1 are registered for components 0, 1 and 2.
        for component, registered in enumerate((5, 3, 1)):
            came = sum(c[component] for c in changes if len(c) > component)
            expected = before.lora_A[component] + came / (0.5 * registered)
            torch.testing.assert_close(after.lora_A[component].double(), expected)

    def test_participants_is_zero_padding_in_expectation(self):
        # All registered nodes come, at rate 1: expected and realized counts are the same.
        happened = Round(came=range(5))
        equal = [replace(update, num_examples=13) for update in happened.updates]
        padded = merge(happened.strategy, equal)

        after = happened.step("participants", rate=1.0)

        for name, factors in padded.items():
            trained = slice(0, 3)
            got = after.modules[name]
            torch.testing.assert_close(got.lora_A[trained], factors.lora_A[trained])
            torch.testing.assert_close(got.lora_B[:, trained], factors.lora_B[:, trained])

    def test_contributors_at_full_participation_are_the_plain_mean(self):
        happened = Round("hafl", range(5), "strategy.selection=prefix")
        plain = merge(happened.strategy, [replace(u, num_examples=13) for u in happened.updates])

        after = happened.step("contributors", rate=1.0)

        for name, factors in plain.items():
            torch.testing.assert_close(after.modules[name].lora_A, factors.lora_A)
            torch.testing.assert_close(after.modules[name].lora_B, factors.lora_B)

    @pytest.mark.parametrize("division", ["contributors", "participants"])
    def test_the_denominators_do_not_depend_on_who_came(self, division):
        happened = Round(came=(0, 1, 2, 3))
        together = flat(happened.step(division)) - flat(happened.step(division, updates=[]))

        alone = [
            flat(happened.step(division, updates=[u])) - flat(happened.step(division, updates=[]))
            for u in happened.updates
        ]

        # A mean over those who came would make the parts larger than the whole.
        torch.testing.assert_close(together, sum(alone), atol=1e-5, rtol=0)

    def test_num_examples_do_not_count(self):
        happened = Round()
        heavier = [replace(u, num_examples=1000 * u.num_examples) for u in happened.updates[:1]]

        again = happened.step("participants", updates=heavier + happened.updates[1:])

        assert torch.equal(flat(again), flat(happened.step("participants")))

    def test_the_head_divides_by_the_expected_number_of_clients(self):
        happened = Round()
        after = happened.step("contributors")

        # Clients 0, 1 and 2 move every number by 0.1, 0.2 and 0.3; 2.5 are expected.
        for name, tensor in happened.previous.head.items():
            torch.testing.assert_close(after.head[name], tensor + 0.6 / 2.5)

    @pytest.mark.parametrize("division", ["contributors", "participants"])
    def test_an_untrained_component_stays_without_noise(self, division):
        happened = Round()
        after = happened.step(division, replace(BARE, noise_multiplier=1.0))

        for name, before in happened.previous.modules.items():
            assert torch.equal(after.modules[name].lora_A[3], before.lora_A[3])
            assert torch.equal(after.modules[name].lora_B[:, 3], before.lora_B[:, 3])
            assert not torch.equal(after.modules[name].lora_B[:, 2], before.lora_B[:, 2])

    def test_a_head_that_does_not_travel_stays_out(self):
        happened = Round()
        happened.previous = happened.previous.with_head({})
        updates = [replace(u, adapter=u.adapter.with_head({})) for u in happened.updates]

        assert happened.step("contributors", updates=updates).head == {}
        with pytest.raises(PrivacyError, match="partition 0: bias is in the update or in the glo"):
            happened.step("contributors")

    def test_dtypes_and_shapes_are_kept(self):
        happened = Round()
        after = happened.step("contributors")

        for before, now in zip(
            happened.previous.modules.values(), after.modules.values(), strict=True
        ):
            assert (now.lora_A.dtype, now.lora_B.dtype) == (torch.float32, torch.float32)
            assert now.lora_A.shape == before.lora_A.shape
        assert all(tensor.dtype == torch.float32 for tensor in after.head.values())

    def test_counts_of_other_plans_are_refused(self):
        happened = Round()
        happened.counts = {n: torch.tensor([[5.0, 3, 0, 0]] * 2) for n in happened.counts}

        with pytest.raises(PrivacyError, match="partition 2, query: component 2 was trained"):
            happened.step("contributors")


class TestOneFactor:
    """FFA-LoRA trains lora_B alone."""

    LOUD = PrivacyOptions("central_dp", clip_norm=0.5, noise_multiplier=4.0)

    def test_counts_are_of_the_factor_that_is_trained(self):
        for of_A, of_B in Round("ffa_lora").counts.values():
            assert torch.equal(of_B, COUNTS)
            assert not of_A.any()

    @pytest.mark.parametrize("division", ["contributors", "participants"])
    def test_the_other_one_gets_no_noise_and_stays_to_the_bit(self, division):
        happened = Round("ffa_lora")
        after = happened.step(division, self.LOUD)

        for name, before in happened.previous.modules.items():
            assert torch.equal(after.modules[name].lora_A, before.lora_A)
            changed = (after.modules[name].lora_B != before.lora_B).any(0)
            assert changed.tolist() == [True, True, True, False]

    def test_the_other_one_counts_nothing_in_the_norm(self):
        happened = Round("ffa_lora", came=(2,))
        (update,) = happened.updates
        moved = [
            update.adapter.modules[n].lora_B.double() - before.lora_B.double()
            for n, before in update.before.modules.items()
        ]
        moved += [
            t.double() - update.before.head[n].double() for n, t in update.adapter.head.items()
        ]
        norm = float(sum(t.square().sum() for t in moved).sqrt())

        total = sum_of_changes(happened.previous, [update], 2 * norm)

        assert float(flat(total).norm()) == pytest.approx(norm, rel=1e-9)
        assert not any(f.lora_A.any() for f in total.modules.values())

    def test_an_update_of_a_factor_that_no_plan_trains_is_refused(self):
        happened = Round("zero_padding")
        for counts in happened.counts.values():
            counts[0] = 0

        with pytest.raises(PrivacyError, match="partition 0, query: component 0 was trained"):
            happened.step("contributors")


class TestSensitivity:
    CLIP = 0.8

    def test_one_client_more_changes_the_sum_by_the_bound_exactly(self):
        happened = Round(came=range(5))
        with_all = flat(sum_of_changes(happened.previous, happened.updates, self.CLIP))

        for left_out in range(5):
            others = [u for i, u in enumerate(happened.updates) if i != left_out]
            without = flat(sum_of_changes(happened.previous, others, self.CLIP))
            # Every client here changes by more than the bound, whatever its rank.
            assert float((with_all - without).norm()) == pytest.approx(self.CLIP, rel=1e-9)

    def test_a_client_that_changes_less_than_the_bound_counts_as_it_is(self):
        happened = Round(came=(2,))
        change = flat(sum_of_changes(happened.previous, happened.updates, 1e6))

        assert flat(
            sum_of_changes(happened.previous, happened.updates, 1.5 * float(change.norm()))
        ).norm() == pytest.approx(float(change.norm()), rel=1e-12)

    def test_no_client_moves_the_adapter_by_more_than_its_share_of_the_bound(self):
        happened = Round(came=(2,))
        options = replace(BARE, clip_norm=self.CLIP)
        moved, still = (
            flat(happened.step("participants", options, 0.5, updates))
            for updates in (happened.updates, [])
        )

        # C / (q N), up to float32.
        assert float((moved - still).norm()) == pytest.approx(self.CLIP / (0.5 * 5), rel=1e-4)

    def test_a_clients_claimed_weight_cannot_raise_it(self):
        happened = Round(came=(2,))
        update = replace(happened.updates[0], num_examples=10**9)

        total = sum_of_changes(happened.previous, [update], self.CLIP)

        assert float(flat(total).norm()) <= self.CLIP * (1 + 1e-12)


class TestNoiseScale:
    """Measured on layers large enough that the standard error is below 1.2 %."""

    RATE, NODES = 0.5, 8
    OPTIONS = PrivacyOptions("central_dp", clip_norm=0.5, noise_multiplier=1.6)  # z C = 0.8
    PLANS = tuple(
        TrainPlan({"query": ModulePlan(tuple(range(rank)), tuple(range(rank)))})
        for rank in (1, 1, 1, 1, 2, 2, 3, 3)
    )

    def noise_of(self, division):
        previous = Adapter(
            {"query": LoraFactors(torch.zeros(4, 4100), torch.zeros(3900, 4))},
            {"weight": torch.zeros(50, 81)},
        )
        counts = trainable_counts(self.PLANS, previous)
        return next_adapter(
            previous, [], counts, self.NODES, self.RATE, self.OPTIONS, NOISE, 1, division
        )

    @pytest.mark.parametrize(
        ("division", "expected"),
        # 0.8 over the expected contributors of each component (4, 2, 1), or over all four.
        [("contributors", (0.2, 0.4, 0.8)), ("participants", (0.2, 0.2, 0.2))],
    )
    def test_each_component_gets_its_own(self, division, expected):
        after = self.noise_of(division).modules["query"]

        for component, std in enumerate(expected):
            assert float(after.lora_A[component].std()) == pytest.approx(std, rel=0.05)
            assert float(after.lora_B[:, component].std()) == pytest.approx(std, rel=0.05)
        assert after.lora_A[3].abs().max() == after.lora_B[:, 3].abs().max() == 0

    @pytest.mark.parametrize("division", ["contributors", "participants"])
    def test_the_head_gets_the_noise_of_all_participants(self, division):
        weight = self.noise_of(division).head["weight"]

        assert float(weight.std()) == pytest.approx(0.2, rel=0.05)
        assert float(weight.mean()) == pytest.approx(0, abs=0.015)

    def test_a_round_without_anybody_is_noise_alone(self):
        happened = Round()
        after = happened.step("contributors", self.OPTIONS, updates=[])

        difference = flat(after) - flat(happened.previous)
        assert difference.isfinite().all()
        assert float(difference.std()) > 0.1


class TestRepeats:
    OPTIONS = replace(BARE, clip_norm=1.0, noise_multiplier=1.0)

    def test_a_round_computed_anew_is_the_same_release(self):
        first, second = (Round().step("contributors", self.OPTIONS) for _ in range(2))

        assert torch.equal(flat(first), flat(second))

    def test_with_other_replies_the_noise_is_fresh(self):
        happened = Round(came=range(5))
        whole = happened.step("participants", self.OPTIONS)
        less = happened.step("participants", self.OPTIONS, updates=happened.updates[:4])

        # With the same noise, the difference would be the fifth client's clipped change / (q N).
        assert float((flat(whole) - flat(less)).norm()) > 2 * 1.0 / (0.5 * 5)

    def test_each_round_has_its_own_noise(self):
        happened = Round()
        one, two = (
            flat(happened.step("participants", self.OPTIONS, updates=[], server_round=r))
            for r in (1, 2)
        )
        assert not torch.isclose(one, two).all()


class TestMethods:
    @pytest.mark.parametrize(
        ("name", "overrides", "division"),
        [
            ("zero_padding", (), "participants"),
            ("fedit", (), "contributors"),
            ("hafl", ("strategy.selection=prefix",), "contributors"),
            ("hafl", ("strategy.selection=random",), "contributors"),
            ("hafl", ("strategy.importance=magnitude",), "contributors"),
            (
                "hafl",
                ("strategy.selection=random", "strategy.aggregation=zero_padding"),
                "participants",
            ),
        ],
    )
    def test_methods_with_fixed_weights_say_what_they_divide_by(self, name, overrides, division):
        assert private_division(strategy_named(name, *overrides)) == division

    @pytest.mark.parametrize(
        ("name", "overrides", "reason"),
        [
            ("hafl", (), "importance=smoothed"),
            ("hafl", ("strategy.importance=contribution",), "importance=contribution"),
            ("hafl", ("strategy.source=server",), "importance=smoothed"),
            ("hetlora", (), "norm"),
            ("flexlora", (), "product"),
            ("flexlora_change", (), "product"),
        ],
    )
    def test_methods_that_depend_on_more_are_refused_by_name(self, name, overrides, reason):
        with pytest.raises(
            StrategyError, match=rf"strategy={name.removesuffix('_change')}: .*{reason}"
        ):
            private_division(strategy_named(name, *overrides))

    def test_selection_by_magnitude_follows_from_the_noised_adapter_alone(self):
        strategy = strategy_named("hafl", "strategy.importance=magnitude")
        profile = NodeProfile(0, 9, MAX_RANK - 2, 17, "cpu")
        before = strategy.plan(profile, 1)
        strategy.global_adapter = strategy.global_adapter.map(
            lambda f: LoraFactors(f.lora_A, f.lora_B * torch.tensor([1e-9, 1.0, 1e-9, 1.0]))
        )

        assert strategy.plan(profile, 1) != before
        assert before.importance == "none"
