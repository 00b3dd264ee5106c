"""Masks and whole numbers of a secure sum."""

import numpy as np
import pytest
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.privacy.masking import (
    Rounding,
    SecureSumError,
    add_mask,
    check_members,
    key_bytes,
    key_of,
    mask,
    pair_sign,
    shared_seed,
)
from hafl_app.privacy.pieces import piece_names


def keys():
    private, public = generate_key_pairs()
    return private, public_key_to_bytes(public)


class TestRounding:
    def changes(self, seed):
        return {"a": np.random.default_rng(seed).uniform(-3, 3, 500), "b": np.array([3.0, -3.0])}

    def test_a_sum_is_exact_up_to_half_a_step_for_each_member(self):
        rounding, shares = Rounding(largest=3.0, members=5), (1.0, 0.3, 0.77, 0.001, 0.5)
        values = [self.changes(seed) for seed in range(5)]
        total = dict(rounding.encode(values[0], dict.fromkeys("ab", shares[0])))
        for one, share in zip(values[1:], shares[1:], strict=True):
            for name, piece in rounding.encode(one, dict.fromkeys("ab", share)).items():
                total[name] = total[name] + piece
        got = rounding.decode(total)
        assert rounding.step == pytest.approx(3.0 * 5 / 2**31, rel=1e-6)
        for name in got:
            exact = sum(s * v[name] for s, v in zip(shares, values, strict=True))
            assert np.abs(got[name] - exact).max() <= 5 * rounding.step / 2 * (1 + 1e-6)

    def test_the_largest_changes_of_all_members_do_not_overflow(self):
        for members in (3, 1000):
            rounding = Rounding(largest=2.0, members=members)
            for sign in (1, -1):
                one = rounding.encode({"a": np.array([sign * 2.0])}, {"a": 1.0})["a"]
                got = rounding.decode({"a": (one.astype(np.uint64) * members).astype(np.uint32)})
                assert got["a"][0] == pytest.approx(sign * 2.0 * members)

    @pytest.mark.parametrize("value", [3.1, -3.1, np.nan, np.inf])
    def test_a_change_beyond_the_range_is_refused_and_not_cut(self, value):
        with pytest.raises(SecureSumError, match=r"more than privacy.largest_change=3"):
            Rounding(3.0, 5).encode({"a": np.array([0.0, value])}, {"a": 1.0})

    @pytest.mark.parametrize(("value", "share"), [(1.0, 3.1), (3.1, 0.1), (1.0, np.nan)])
    def test_and_one_that_its_weight_takes_there_or_back(self, value, share):
        with pytest.raises(SecureSumError, match=r"more than privacy.largest_change=3"):
            Rounding(3.0, 5).encode({"a": np.array([value])}, {"a": share})


class TestMasks:
    def test_both_of_a_pair_draw_the_same_and_it_cancels(self):
        (one, of_one), (other, of_other) = keys(), keys()
        seed = shared_seed(one, of_other)
        assert seed == shared_seed(other, of_one)
        vectors = [{"a": np.arange(4, dtype=np.uint32)} for _ in range(2)]
        add_mask(vectors[0], seed, frozenset("a"), pair_sign(7, 9))
        add_mask(vectors[1], seed, frozenset("a"), pair_sign(9, 7))
        assert (vectors[0]["a"] != np.arange(4)).all()
        assert (vectors[0]["a"] + vectors[1]["a"] == 2 * np.arange(4, dtype=np.uint32)).all()

    def test_is_uniform_and_its_own_for_every_seed_and_piece(self):
        drawn = mask(b"seed", "a", 40_000)
        share = np.bincount(drawn >> 28, minlength=16) / len(drawn)
        assert np.abs(share - 1 / 16).max() < 5 * np.sqrt(15 / 256 / len(drawn))
        assert drawn.max() > 2**32 * 0.999
        for other in (mask(b"seed", "b", 40_000), mask(b"seee", "a", 40_000)):
            assert (other == drawn).mean() < 0.001

    def test_only_pieces_of_both_are_masked(self):
        vector = {"a": np.zeros(3, np.uint32), "b": np.zeros(3, np.uint32)}
        add_mask(vector, b"seed", frozenset({"b", "c"}), 1)
        assert not vector["a"].any()
        assert vector["b"].all()

    def test_a_key_survives_as_a_number(self):
        private, _ = keys()
        assert key_bytes(key_of(key_bytes(private))) == key_bytes(private)
        with pytest.raises(SecureSumError, match="do not belong together"):
            key_of(bytes(48))

    def test_a_public_key_that_is_none_is_refused(self):
        with pytest.raises(SecureSumError, match="public key cannot be read"):
            shared_seed(keys()[0], b"none")


class TestMembers:
    def names(self, rank, factors="both"):
        components = tuple(range(rank))
        module = ModulePlan(components, components, factors=factors)
        return piece_names(TrainPlan({"q": module}), ["bias"])

    def test_names_are_of_what_is_uploaded(self):
        assert self.names(1) == {"lora_A/q/0", "lora_B/q/0", "head/bias"}
        assert self.names(2, "B") == {"lora_B/q/0", "lora_B/q/1", "head/bias"}

    def test_a_piece_of_two_clients_is_refused(self):
        check_members([self.names(1)] * 3 + [self.names(2)] * 3)
        with pytest.raises(SecureSumError, match=r"lora_A/q/1 would be summed over 2 clients"):
            check_members([self.names(1)] * 3 + [self.names(2)] * 2)
