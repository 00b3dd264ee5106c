"""The whole protocol of a secure sum, without training: keys, shares, masked vectors, opening."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import HEAD, Client, merge, noise, run_options, strategy_named, update_of
from flwr.app import Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from hafl_app.client.error_replies import errors_as_replies
from hafl_app.client.secure_sum import answer_secure, masked, open_sum, with_unchosen
from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.factors import Adapter
from hafl_app.privacy.masking import SecureSumError
from hafl_app.privacy.mechanism import PrivacyOptions, trained_part
from hafl_app.privacy.pieces import weight_names
from hafl_app.server.secure_sum import SecureSum
from hafl_app.server.traffic import Ledger
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.secure_sum import (
    SECURE,
    VECTOR,
    AskMasked,
    AskShares,
    AskUnmask,
    Unmask,
    read_secure,
    secure_record,
    stage_of,
    write_vector,
)

LARGEST = 4.0
RANKS = (2, 2, 4, 4, 4)
EXAMPLES = (10, 25, 7, 31, 4)
BY_NORM = ("strategy.pruning=false",)
TWO_RANKS, OF_TWO_RANKS = (2, 2, 2, 4, 4, 4, 4), (10, 25, 7, 31, 4, 12, 9)


class Nodes:
    """Nodes that answer a secure sum's messages at once, but for those that are dead by then."""

    answers_at_once = True

    def __init__(self):
        self.states, self.dead, self.asked = {}, {}, 0

    def send_and_receive(self, messages, *, timeout):
        del timeout
        replies = []
        for message in messages:
            self.asked += 1
            message.metadata.__dict__["_message_id"] = str(self.asked)
            node_id = message.metadata.dst_node_id
            if self.dead.get(node_id) == stage_of(message.content):
                continue
            state = self.states.setdefault(node_id, RecordDict())
            replies.append(_answer(message, state))
        return replies


@errors_as_replies
def _handler(message, context):
    return answer_secure(message, context.state)


class _Context:
    def __init__(self, state):
        self.state, self.node_config = state, {}


def _answer(message: Message, state: RecordDict) -> Message:
    return _handler(message, _Context(state))


class Round:
    """One round: a method's clients, their true updates, and the secure sum over them."""

    def __init__(
        self,
        name="zero_padding",
        ranks=RANKS,
        examples=EXAMPLES,
        settings=(),
        largest=LARGEST,
        server_round=1,
        **dead,
    ):
        self.strategy, self.nodes = strategy_named(name, *settings), Nodes()
        self.strategy.options = run_options(
            self.strategy.options, privacy=PrivacyOptions(secure_aggregation=True)
        )
        clients = [Client(r, n, i) for i, (r, n) in enumerate(zip(ranks, examples, strict=True))]
        self.updates = [update_of(self.strategy, c, noise, server_round) for c in clients]
        self.plans = {c.partition_id: self.strategy.plan(c.profile, server_round) for c in clients}
        changed = {n: torch.ones(shape) for n, shape in HEAD.items()}
        self.updates = [
            replace(
                u,
                adapter=Adapter(
                    u.adapter.modules,
                    {n: t + i * changed[n] / 10 for n, t in u.adapter.head.items()},
                ),
            )
            for i, u in enumerate(self.updates)
        ]
        self.nodes.dead = {int(n[1:]): stage for n, stage in dead.items()}
        # Numbers as Flower draws them, and in another order than the partitions.
        self.profiles = [replace(c.profile, node_id=900 - 7 * c.partition_id) for c in clients]
        self.ledger = Ledger()
        self.secure = SecureSum(self.nodes, self.ledger, 3, 5.0, largest)

    def uploads(self):
        """Run all up to the uploads; return the masked vector of each node."""
        agreed = self.secure.agree(self.profiles)
        there = {p.partition_id for p in agreed}
        self.updates = [u for u in self.updates if u.partition_id in there]
        plans = [self.plans[u.partition_id] for u in self.updates]
        examples = [u.num_examples for u in self.updates]
        weights = list(map(self.strategy.planned_weight, plans, examples))
        self.secure.plan(agreed, plans, examples, weights, list(HEAD))
        return {
            p.node_id: self.upload(p.node_id, update)
            for p, update in zip(agreed, self.updates, strict=True)
        }

    def upload(self, node_id, update, state=None):
        """Do what a node does with a request to train."""
        content = RecordDict({SECURE: secure_record(self.secure.record_for(node_id))})
        asked = read_secure(content, AskMasked)
        after = update.adapter.only(update.plan.uploaded_factors)
        plan = self.plans[update.partition_id]
        before = trained_part(update.sent, plan)
        after = with_unchosen(after, before, update.plan, plan)
        state = self.nodes.states[node_id] if state is None else state
        return masked(state, node_id, asked, plan, after, before)

    def opened(self, vectors, lost=()):
        """Return what the server reads of those whose vector came."""
        came = []
        for profile in self.profiles:
            update = next((u for u in self.updates if u.partition_id == profile.partition_id), None)
            if update is None or profile.partition_id in lost:
                continue
            pieces, plan = vectors[profile.node_id], self.plans[profile.partition_id]
            content = RecordDict({VECTOR: write_vector(pieces, sorted(pieces))})
            self.secure.take(profile.node_id, content, plan, update.sent)
            before = trained_part(update.sent, plan)
            same = before.filled(update.sent) if plan.choice else update.before
            came.append(replace(update, plan=plan, adapter=same))
        return self.secure.opened(came)


def assert_same(strategy, opened, updates, bound=None):
    """Hold an opened sum to the updates themselves, to the bound of the rounding."""
    step = LARGEST * len(EXAMPLES) / 2**31
    bound = bound or len(updates) * step / 2 * max(EXAMPLES) / min(EXAMPLES) + 1e-6
    got, expected = merge(strategy, opened), merge(strategy, updates)
    for name, factors in expected.items():
        for factor in ("lora_A", "lora_B"):
            difference = getattr(got[name], factor) - getattr(factors, factor)
            assert difference.abs().max() < bound, (name, factor)
    total = sum(u.num_examples for u in updates)
    for name in HEAD:
        mean = sum(u.num_examples * u.adapter.head[name].double() for u in updates) / total
        of_sum = sum(u.num_examples * u.adapter.head[name].double() for u in opened) / total
        assert (mean - of_sum).abs().max() < bound


@pytest.fixture(autouse=True)
def as_server():
    with server_identity():
        yield


class TestSum:
    @pytest.mark.parametrize("name", ["zero_padding", "rbla", "fslora", "ffa_lora", "fedsa_lora"])
    def test_is_that_of_the_updates(self, name):
        # Components are drawn for fslora; of the largest rank there is one draw.
        made = Round(name, ranks=(4, 4, 4, 4, 4) if name == "fslora" else RANKS)
        opened = made.opened(made.uploads())
        assert_same(made.strategy, opened, made.updates)

    def test_of_cores_is_the_mean_of_cores(self):
        made = Round("fed_sb", ranks=(3, 3, 3, 3, 3))
        assert_same(made.strategy, made.opened(made.uploads()), made.updates)

    @pytest.mark.parametrize("selection", ["prefix", "random"])
    def test_weighs_by_what_the_plan_says(self, selection):
        """The part of an example falls with the components that its client trains."""
        settings = (f"strategy.selection={selection}", "strategy.factors=both")
        ranks = RANKS if selection == "prefix" else (4, 4, 4, 4, 4)
        made = Round("hafl_plus", ranks=ranks, settings=settings)
        assert_same(made.strategy, made.opened(made.uploads()), made.updates)

    def test_no_update_is_what_its_client_sent(self):
        made = Round()
        for got, sent in zip(made.opened(made.uploads()), made.updates, strict=True):
            for name, factors in got.adapter.modules.items():
                assert (factors.lora_B - sent.adapter.modules[name].lora_B).abs().min() > 1e-5

    def test_costs_no_client_more_numbers_than_its_upload(self):
        made = Round()
        for update, vector in zip(made.updates, made.uploads().values(), strict=True):
            numbers = trained_part(update.sent, update.plan)
            expected = sum(t.numel() for t in numbers.tensors().values())
            assert sum(map(len, vector.values())) == expected

    def test_bytes_of_keys_and_shares_are_in_the_ledger(self):
        made = Round()
        made.opened(made.uploads())
        traffic = made.ledger.of_round(3)
        assert traffic.bytes_up > 5 * 2 * 200
        assert traffic.bytes_down > 5 * 5 * 2 * 200
        assert traffic.exchanges == 0  # a client is asked to train once


class TestOwnWeights:
    """HetLoRA: clients weigh themselves by the norm of their product, which no one else sees."""

    def made(self, *settings, **changes):
        known = {"ranks": TWO_RANKS, "examples": OF_TWO_RANKS, "largest": 100.0}
        return Round("hetlora", settings=(*BY_NORM, *settings), **(known | changes))

    def bound(self, made):
        """Return what docs/privacy.md says of the rounding, and float32's beside it."""
        step = 100.0 * len(TWO_RANKS) / 2**31
        norms = [made.strategy.norms(update) for update in made.updates]
        least = min(sum(one[name] for one in norms) for name in norms[0]) or 1.0
        largest = max(t.abs().max() for u in made.updates for t in u.adapter.tensors().values())
        before = max(t.abs().max() for t in made.strategy.global_adapter.tensors().values())
        return len(TWO_RANKS) * step * (1 + before + largest) / (2 * least) + 1e-6

    @pytest.mark.parametrize("norm_of", ["state", "change"])
    @pytest.mark.parametrize("scope", ["module", "client"])
    def test_make_the_mean_by_norms(self, norm_of, scope):
        made = self.made(f"strategy.norm_of={norm_of}", f"strategy.norm_scope={scope}")
        opened = made.opened(made.uploads())
        assert_same(made.strategy, opened, made.updates, self.bound(made))
        # Means by examples, or equal ones, are far from it.
        by_examples = [replace(u, own_weights={}) for u in opened]
        with pytest.raises(AssertionError):
            assert_same(made.strategy, by_examples, made.updates, self.bound(made))

    def test_one_that_drops_out_takes_its_weight_along(self):
        made = self.made()
        opened = made.opened(made.uploads(), {4})
        rest = [u for u in made.updates if u.partition_id != 4]
        assert_same(made.strategy, opened, rest, self.bound(made))

    def test_the_server_sees_their_mean_over_the_clients_of_a_rank(self):
        made = self.made()
        opened = made.opened(made.uploads())
        for group in (slice(0, 3), slice(3, 7)):
            true = [made.strategy.norms(u)["query"] for u in made.updates[group]]
            seen = {u.own_weights["query"] for u in opened[group]}
            assert len(seen) == 1
            assert seen.pop() == pytest.approx(sum(true) / len(true), abs=1e-6)
            assert max(true) - min(true) > 0.1

    def test_of_fewer_than_three_clients_are_in_no_sum(self):
        line = r"weight of the clients with components 0-1 in dense would be summed over 2 clients"
        made = self.made(ranks=RANKS, examples=EXAMPLES)
        with pytest.raises(SecureSumError, match=line):
            made.uploads()
        for member in (p.node_id for p in made.profiles):  # nor where the server does not look
            with pytest.raises(SecureSumError, match=line):
                made.upload(member, made.updates[(900 - member) // 7])

    def test_are_no_difference_of_two_sums(self):
        """One weight for all modules: its groups are those of one plan, whatever the module."""
        patterns = ({}, {}, {}, {"dense": 2}, {"dense": 2}, {"dense": 2}, {"dense": 2})
        made = self.made("strategy.norm_scope=client", ranks=(4, 4, 4, 4, 4, 4, 4))
        made.profiles = [
            replace(profile, rank_pattern=pattern)
            for profile, pattern in zip(made.profiles, patterns, strict=True)
        ]
        plans = [made.strategy.plan(profile, 1) for profile in made.profiles]
        names = [set(weight_names(plan).values()) for plan in plans]
        assert all(len(one) == 1 for one in names)
        assert len(set.union(*names)) == 2

    def test_above_what_a_sum_can_hold_fail_on_their_client(self):
        made = self.made(largest=2.0)  # all norms are above it
        with pytest.raises(SecureSumError, match=r"weight of .* adds more than privacy.largest"):
            made.uploads()

    def test_of_nothing_leave_all_as_it_was(self):
        made = self.made("strategy.norm_of=change")
        made.updates = [replace(u, adapter=u.before) for u in made.updates]
        opened = made.opened(made.uploads())
        assert {w for u in opened for w in u.own_weights.values()} == {0.0}
        assert_same(made.strategy, opened, made.updates, self.bound(made))


class TestHiddenChoice:
    """LoRA-A2: each client chooses what it trains, and uploads zeros for the rest."""

    @pytest.mark.parametrize("server_round", [1, 2])
    @pytest.mark.parametrize("lost", [(), {1}])
    def test_is_the_sum_over_those_who_chose(self, server_round, lost):
        made = Round("lora_a2", ranks=(1, 1, 2, 2, 1), server_round=server_round)
        counts = Counter(
            (n, i) for u in made.updates for n in u.adapter.modules for i in u.components(n)
        )
        assert min(counts.values()) < 3  # by itself such a component would be in no sum
        opened = made.opened(made.uploads(), lost)
        assert_same(made.strategy, opened, [u for u in made.updates if u.partition_id not in lost])

    def test_is_in_no_vector(self):
        made = Round("lora_a2")
        vectors = made.uploads().values()
        assert len({tuple(sorted(vector)) for vector in vectors}) == 1
        for vector in vectors:
            assert len(np.concatenate(list(vector.values()))) == 4 * (7 + 6) + 3 * 7 + 3

    def test_costs_the_bytes_of_the_global_rank(self):
        made = Round("lora_a2")
        _, masked_bytes = made.strategy.payload_bytes(made.profiles[0])
        assert masked_bytes == 4 * (4 * (7 + 6) + 3 * 7 + 3)
        made.strategy.options = run_options(made.strategy.options, privacy=PrivacyOptions())
        _, named_bytes = made.strategy.payload_bytes(made.profiles[0])
        assert named_bytes == 4 * (4 * 7 + 3 * 7 + 3)  # four vectors of the larger module


class TestServersView:
    def flat(self, vector):
        return np.concatenate([vector[name] for name in sorted(vector)])

    def test_a_masked_vector_is_not_the_update_and_differs_every_time(self):
        one, other = Round().uploads(), Round().uploads()
        plain = Round()
        plain.uploads()
        for node_id in one:
            numbers = self.flat(one[node_id])
            assert (numbers != self.flat(other[node_id])).mean() > 0.99
            # A change of at most LARGEST over five members uses a fifth of the range: no mask, and
            # all numbers were near 0 or near 2^32.
            middle = (numbers > 2**31 * 0.5) & (numbers < 2**31 * 1.5)
            assert 0.3 < middle.mean() < 0.7

    def test_without_masks_it_would_be(self, monkeypatch):
        monkeypatch.setattr("hafl_app.client.secure_sum.add_mask", lambda *_: None)
        numbers = self.flat(next(iter(Round().uploads().values())))
        middle = (numbers > 2**31 * 0.5) & (numbers < 2**31 * 1.5)
        assert not middle.any()

    def test_pair_masks_alone_do_not_make_the_sum_without_opening(self):
        made = Round(ranks=(4, 4, 4, 4, 4))
        vectors = made.uploads()
        total = sum(self.flat(v).astype(np.uint64) for v in vectors.values()).astype(np.uint32)
        middle = (total > 2**31 * 0.5) & (total < 2**31 * 1.5)
        assert middle.mean() > 0.3  # own masks are still on it


class TestDropouts:
    @pytest.mark.parametrize("lost", [{0}, {3}])
    def test_an_upload_that_does_not_come_is_left_out_of_the_sum(self, lost):
        made = Round(ranks=(4, 4, 4, 4, 4))
        opened = made.opened(made.uploads(), lost)
        rest = [u for u in made.updates if u.partition_id not in lost]
        assert len(opened) == 4
        assert_same(made.strategy, opened, rest)

    @pytest.mark.parametrize("stage", ["AskKeys", "AskShares"])
    def test_one_that_is_silent_before_is_not_asked(self, stage):
        made = Round(ranks=(4, 4, 4, 4, 4), n900=stage)
        opened = made.opened(made.uploads())
        assert [u.partition_id for u in opened] == [1, 2, 3, 4]
        assert_same(made.strategy, opened, made.updates)

    def test_one_that_is_silent_after_its_upload_counts(self):
        made = Round(ranks=(4, 4, 4, 4, 4), n900="AskUnmask")
        assert_same(made.strategy, made.opened(made.uploads()), made.updates)

    def test_too_few_uploads_end_it(self):
        made = Round(ranks=(4, 4, 4, 4, 4))
        vectors = made.uploads()
        line = "2 of 5 clients have uploaded, the secure sum needs 3"
        with pytest.raises(SecureSumError, match=line):
            made.opened(vectors, {0, 1, 2})

    def test_too_few_who_open_end_it(self):
        dead = dict.fromkeys(("n900", "n893", "n886"), "AskUnmask")
        made = Round(ranks=(4, 4, 4, 4, 4), **dead)
        line = "2 of 5 clients have opened the sum, the secure sum needs 3"
        with pytest.raises(SecureSumError, match=line):
            made.opened(made.uploads())

    def test_too_few_with_keys_end_it(self):
        dead = dict.fromkeys(("n900", "n893", "n886"), "AskKeys")
        with pytest.raises(SecureSumError, match="2 of 5 clients have sent keys"):
            Round(**dead).uploads()

    def test_a_rank_that_too_few_are_left_of_ends_it(self):
        made = Round()  # three clients of rank 4
        vectors = made.uploads()
        with pytest.raises(SecureSumError, match=r"lora_./.*/2 would be summed over 2 clients"):
            made.opened(vectors, {2})


class TestNode:
    """What an honest node refuses to a curious server."""

    def ready(self):
        made = Round(ranks=(4, 4, 4, 4, 4))
        made.uploads()
        members = [p.node_id for p in made.profiles]
        return made, members

    def ask(self, made, node_id, there, missing):
        return open_sum(made.nodes.states[node_id], AskUnmask(3, there, missing))

    def test_opens_a_round_once(self):
        made, members = self.ready()
        assert isinstance(self.ask(made, 900, members, []), Unmask)
        with pytest.raises(SecureSumError, match="out of its turn"):
            self.ask(made, 900, members[1:], members[:1])

    def test_never_gives_both_secrets_of_a_member(self):
        made, members = self.ready()
        with pytest.raises(SecureSumError, match="not those of the round"):
            self.ask(made, 900, members, members[:1])

    def test_does_not_open_a_sum_of_few(self):
        made, members = self.ready()
        with pytest.raises(SecureSumError, match="2 of 5 members are too few"):
            self.ask(made, 900, members[:2], members[2:])

    def test_does_not_open_a_sum_in_which_a_number_is_of_few(self):
        made = Round()
        made.uploads()
        members = [p.node_id for p in made.profiles]
        with pytest.raises(SecureSumError, match="would be summed over 2 clients"):
            self.ask(made, 900, members[:4], members[4:])

    def test_does_not_mask_twice_with_the_same_masks(self):
        made, _ = self.ready()
        with pytest.raises(SecureSumError, match="out of its turn"):
            made.upload(900, made.updates[0])

    def test_does_not_take_part_where_a_number_is_of_few(self):
        made = Round(ranks=(2, 2, 2, 4, 4))
        with pytest.raises(SecureSumError, match="would be summed over 2 clients"):
            made.uploads()
        for member in (p.node_id for p in made.profiles):  # nor where the server does not look
            with pytest.raises(SecureSumError, match="would be summed over 2 clients"):
                made.upload(member, made.updates[(900 - member) // 7])

    def test_finds_its_own_keys_replaced(self, monkeypatch):
        made = Round()
        keys = made.secure.agree(made.profiles)
        assert len(keys) == 5
        again = Round()
        monkeypatch.setattr(
            "hafl_app.server.secure_sum.AskShares",
            lambda r, t, m, e, k: AskShares(r, t, m, e[1:] + e[:1], k),
        )
        with pytest.raises(SecureSumError, match="0 of 5 clients have shared their secrets"):
            again.secure.agree(again.profiles)

    def test_wrong_messages_are_refused(self):
        made, _ = self.ready()
        with pytest.raises(RecordError, match="no 'AskUnmask'"):
            read_secure(RecordDict(), AskUnmask)
        record = secure_record(AskUnmask(3, [1], []))
        record["there"] = ["1"]
        with pytest.raises(RecordError, match="'there' is missing, or no list"):
            read_secure(RecordDict({SECURE: record}), AskUnmask)
        with pytest.raises(RecordError, match="masked bytes, expected"):
            vector = {"a": np.zeros(3, np.uint32)}
            content = RecordDict({VECTOR: write_vector(vector, ["a"])})
            made.secure.take(900, content, made.updates[0].plan, made.updates[0].sent)


@pytest.mark.parametrize("numbers", [[], [3, 2**63 + 5, 2**64 - 1], [1, 2]])
def test_messages_survive_flowers_wire(numbers):
    """Node ids have 64 bits, and lists may be empty."""
    keys = [bytes([i]) * 9 for i, _ in enumerate(numbers)]
    for message in (
        AskUnmask(3, numbers, []),
        Unmask(numbers, keys, [], []),
        AskMasked(3, numbers, keys, ["plan"] * len(numbers), [0] * len(numbers), 1.0, 1.0, 10.0),
    ):
        content = RecordDict({SECURE: secure_record(message)})
        read = recorddict_from_proto(recorddict_to_proto(content))
        assert read_secure(read, type(message)) == message
