from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from driving import (
    MAX_RANK,
    SHAPES,
    Client,
    merge,
    noise,
    nothing,
    run_options,
    strategy_named,
    update_of,
)
from flwr.app import Message, MessageType
from running import run_tiny

from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.factors import Adapter, LoraFactors, initial_adapter
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.tail_pruning import TailPruning
from hafl_app.server.reply_validation import ReplyError, read_update
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.hetlora import HetLora
from hafl_app.training.adapter_arrays import to_arrays
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.local import train
from hafl_app.training.settings import BaseSpec, TrainOptions
from hafl_app.wire.records import AdapterArrays, adapter_content

CLIENTS = [Client(r, n, i) for i, (r, n) in enumerate([(1, 10), (2, 25), (4, 7), (3, 31)])]


def hetlora(*overrides: str) -> HetLora:
    strategy = strategy_named("hetlora", *(f"strategy.{o}" for o in overrides))
    assert isinstance(strategy, HetLora)
    return strategy


def dense(factors: LoraFactors) -> torch.Tensor:
    return factors.lora_B.double() @ factors.lora_A.double()


def pruned(update: ClientUpdate, ranks: dict[str, int]) -> ClientUpdate:
    """Return the update of a client whose tails shrank in these modules."""
    modules = {n: f.select(range(ranks.get(n, f.rank))) for n, f in update.adapter.modules.items()}
    return replace(update, adapter=Adapter(modules, update.adapter.head))


def zero_padded_mean(
    updates: list[ClientUpdate], module: str, weights: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    shape, total = SHAPES[module], sum(weights)
    lora_A = torch.zeros(MAX_RANK, shape.in_features, dtype=torch.float64)
    lora_B = torch.zeros(shape.out_features, MAX_RANK, dtype=torch.float64)
    for weight, update in zip(weights, updates, strict=True):
        factors = update.adapter.modules[module]
        lora_A[: factors.rank] += weight / total * factors.lora_A.double()
        lora_B[:, : factors.rank] += weight / total * factors.lora_B.double()
    return lora_A, lora_B


def assert_is_mean(strategy: HetLora, updates: list[ClientUpdate], weights: dict[str, list]):
    after = merge(strategy, updates)
    for name, factors in after.items():
        lora_A, lora_B = zero_padded_mean(updates, name, [float(w) for w in weights[name]])
        torch.testing.assert_close(factors.lora_A.double(), lora_A, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(factors.lora_B.double(), lora_B, rtol=1e-5, atol=1e-7)


class TestWeights:
    def updates(self, strategy: HetLora) -> list[ClientUpdate]:
        return [update_of(strategy, client, noise) for client in CLIENTS]

    def test_norms_of_the_dense_states(self):
        strategy = hetlora()
        updates = self.updates(strategy)
        norms = {n: [dense(u.adapter.modules[n]).norm() for u in updates] for n in SHAPES}
        assert_is_mean(strategy, updates, norms)

    def test_one_weight_a_client(self):
        strategy = hetlora("norm_scope=client")
        updates = self.updates(strategy)
        sums = [sum(dense(f).norm() for f in u.adapter.modules.values()) for u in updates]
        assert_is_mean(strategy, updates, dict.fromkeys(SHAPES, sums))

    def test_norms_of_the_dense_changes(self):
        strategy = hetlora("norm_of=change")
        updates = self.updates(strategy)
        updates[3] = pruned(updates[3], {"query": 2})
        norms = {
            n: [(dense(u.adapter.modules[n]) - dense(u.sent.modules[n])).norm() for u in updates]
            for n in SHAPES
        }
        assert_is_mean(strategy, updates, norms)

    def test_numbers_of_examples(self):
        strategy = hetlora("weighting=examples")
        updates = self.updates(strategy)
        examples = [client.num_examples for client in CLIENTS]
        assert_is_mean(strategy, updates, dict.fromkeys(SHAPES, examples))

    @pytest.mark.parametrize("norm_of", ["state", "change"])
    def test_the_scaling_is_in_what_a_client_adds_to_the_base(self, norm_of):
        strategy = hetlora(f"norm_of={norm_of}")
        strategy.options = run_options(lora_alpha=8, scaling="per_rank")
        updates = self.updates(strategy)
        norms = {
            n: [
                (dense(u.adapter.modules[n]) - sent * dense(u.sent.modules[n])).norm()
                for u in updates
            ]
            for n in SHAPES
            for sent in [norm_of == "change"]
        }
        assert_is_mean(strategy, updates, norms)

    @pytest.mark.parametrize("norm_of", ["state", "change"])
    def test_without_any_norm_examples_count(self, norm_of):
        strategy = hetlora(f"norm_of={norm_of}")
        change = nothing
        if norm_of == "state":
            strategy.global_adapter = initial_adapter(SHAPES, MAX_RANK, seed=1)

            def change(factors, generator):
                return LoraFactors(noise(factors, generator).lora_A, factors.lora_B)

        updates = [update_of(strategy, client, change) for client in CLIENTS]
        assert set(strategy.norms(updates[2]).values()) == {0.0}
        examples = [client.num_examples for client in CLIENTS]
        assert_is_mean(strategy, updates, dict.fromkeys(SHAPES, examples))

    @pytest.mark.parametrize(
        "setting", ["weighting=examples", "norm_scope=client", "norm_of=change"]
    )
    def test_each_setting_matters(self, setting):
        plain, changed = hetlora(), hetlora(setting)
        updates = self.updates(plain)
        before, after = merge(plain, updates), merge(changed, updates)
        assert all((dense(before[n]) - dense(after[n])).norm() > 1e-3 for n in SHAPES)


class TestTail:
    def plan(self, *overrides: str) -> TrainPlan:
        return hetlora(*overrides).plan(CLIENTS[2].profile, 1)

    def test_settings_reach_the_client(self):
        plan = self.plan("decay=0.6", "tail_weight=0.3", "min_rank=3")
        assert plan.tail == TailPruning(0.6, 0.3, 3, prune=True)
        assert TrainPlan.from_json(plan.to_json()) == plan

    def test_switches(self):
        assert self.plan("pruning=false").tail == TailPruning(0.99, 0.01, 2, prune=False)
        assert self.plan("regularizer=false").tail == TailPruning(0.99, 0.0, 2, prune=True)
        assert self.plan("pruning=false", "regularizer=false").tail is None

    @pytest.mark.parametrize(
        ("decay", "min_rank", "rank", "start"),
        # max(r_min, floor(gamma r)), never above r
        [
            (0.99, 2, 8, 7),
            (0.99, 2, 100, 99),
            (0.99, 2, 101, 99),
            (0.85, 5, 50, 42),
            (0.29, 1, 100, 29),  # 0.29 * 100 is below 29 in binary
            (0.5, 3, 4, 3),
            (0.5, 3, 2, 2),
            (1.0, 1, 9, 9),
        ],
    )
    def test_start(self, decay, min_rank, rank, start):
        tail = TailPruning(decay, 0.1, min_rank)
        assert tail.start(rank) == start
        assert tail.uploads(rank) == {rank, start}

    @pytest.mark.parametrize(
        ("rank", "prune", "counts"),
        [(4, True, True), (3, True, True), (2, True, False), (3, False, False), (4, False, True)],
    )
    def test_a_reply_may_prune_once_or_not_at_all(self, rank, prune, counts):
        strategy = hetlora(f"pruning={prune}")
        update = pruned(update_of(strategy, CLIENTS[2], noise), {"query": rank})
        arrays = AdapterArrays(*to_arrays(update.adapter.with_head({})))
        with server_identity():
            reply = Message(adapter_content(arrays), 1, MessageType.TRAIN)
        shapes = {n: (s.out_features, s.in_features) for n, s in SHAPES.items()}
        if counts:
            assert read_update(reply, update.plan, {}, shapes).modules["query"][0].shape[0] == rank
        else:
            with pytest.raises(ReplyError, match=f"query: rank {rank}, expected "):
                read_update(reply, update.plan, {}, shapes)


class TestMemory:
    def ranks(self, strategy: HetLora, client: Client) -> dict[str, int]:
        modules = strategy.plan(client.profile, 1).modules
        assert all(m.held == m.trainable == tuple(range(len(m.held))) for m in modules.values())
        return {name: len(module.held) for name, module in modules.items()}

    def test_a_pruned_rank_stays(self):
        strategy, client = hetlora(), CLIENTS[2]
        merge(strategy, [pruned(update_of(strategy, client, noise), {"query": 3})])
        assert self.ranks(strategy, client) == {"query": 3, "dense": 4}
        for _ in range(2):  # the whole of what is left comes back
            merge(strategy, [update_of(strategy, client, noise)])
            assert self.ranks(strategy, client) == {"query": 3, "dense": 4}
        merge(strategy, [pruned(update_of(strategy, client, noise), {"query": 2, "dense": 3})])
        assert self.ranks(strategy, client) == {"query": 2, "dense": 3}

    def test_it_belongs_to_the_partition_not_to_the_node(self):
        strategy, client = hetlora(), CLIENTS[2]
        merge(strategy, [pruned(update_of(strategy, client, noise), {"query": 3})])
        back = replace(client.profile, node_id=77)
        assert len(strategy.plan(back, 2).modules["query"].held) == 3
        assert self.ranks(strategy, Client(4, 7, 9)) == {"query": 4, "dense": 4}

    def test_a_smaller_budget_still_counts(self):
        strategy, client = hetlora(), CLIENTS[2]
        merge(strategy, [pruned(update_of(strategy, client, noise), {"query": 3})])
        assert self.ranks(strategy, replace(client, rank=2)) == {"query": 2, "dense": 2}

    def test_a_new_run_starts_afresh(self):
        strategy = hetlora()
        merge(strategy, [pruned(update_of(strategy, CLIENTS[2], noise), {"query": 3})])
        assert strategy.pruned_ranks
        assert hetlora().pruned_ranks == {}


class TestHighComponents:
    def test_those_that_no_participant_holds_keep_their_value(self):
        strategy = hetlora()
        before = strategy.global_adapter.modules
        after = merge(strategy, [update_of(strategy, client, noise) for client in CLIENTS[:2]])
        for name, factors in after.items():
            assert torch.equal(factors.lora_A[2:], before[name].lora_A[2:])
            assert torch.equal(factors.lora_B[:, 2:], before[name].lora_B[:, 2:])
            assert not torch.equal(factors.lora_B[:, :2], before[name].lora_B[:, :2])

    def test_those_that_their_holders_pruned_become_zero_but_can_learn(self):
        strategy = hetlora()
        before = strategy.global_adapter.modules
        updates = [update_of(strategy, client, noise) for client in CLIENTS]
        updates[2] = pruned(updates[2], {"query": 3})
        after = merge(strategy, updates)
        assert not after["query"].lora_B[:, 3].any()
        assert torch.equal(after["query"].lora_A[3], before["query"].lora_A[3])
        assert after["dense"].lora_B[:, 3].any()


class TestTrajectory:
    """Three rounds beside the paper's rules in plain NumPy on zero-padded arrays."""

    # Who takes part, and the ranks that they are left with where they prune.
    ROUNDS = (
        ((0, 1, 2, 3), {2: {"query": 3}, 3: {"dense": 2}}),
        ((1, 2), {2: {"query": 2, "dense": 3}}),
        ((0, 2, 3), {}),
    )

    def test_three_rounds(self):
        strategy = hetlora()
        oracle = {
            n: (f.lora_B.double().numpy(), f.lora_A.double().numpy())
            for n, f in strategy.global_adapter.modules.items()
        }
        ranks = {(c.partition_id, n): c.rank for c in CLIENTS for n in SHAPES}
        generator = np.random.default_rng(4)
        for server_round, (participants, prunes) in enumerate(self.ROUNDS, start=1):
            updates, uploads = [], {n: [] for n in SHAPES}
            for k in participants:
                plan = strategy.plan(CLIENTS[k].profile, server_round)
                sent, modules = strategy.dispatch(plan), {}
                for n, (global_B, global_A) in oracle.items():
                    held = ranks[k, n]
                    B = global_B[:, :held] + generator.normal(size=(len(global_B), held))
                    A = global_A[:held] + generator.normal(size=(held, global_A.shape[1]))
                    np.testing.assert_allclose(sent.modules[n].lora_B, global_B[:, :held], 1e-4)
                    np.testing.assert_allclose(sent.modules[n].lora_A, global_A[:held], 1e-4)
                    left = ranks[k, n] = prunes.get(k, {}).get(n, held)
                    uploads[n].append((B[:, :left], A[:left], held))
                    modules[n] = LoraFactors(
                        torch.tensor(A[:left]).float(), torch.tensor(B[:, :left]).float()
                    )
                adapter = Adapter(modules, sent.head)
                updates.append(ClientUpdate(k, CLIENTS[k].num_examples, plan, sent, adapter))
            oracle = {n: self.step(oracle[n], uploads[n]) for n in SHAPES}
            strategy.global_adapter = Adapter(merge(strategy, updates))
        for n, (B, A) in oracle.items():
            factors = strategy.global_adapter.modules[n]
            np.testing.assert_allclose(factors.lora_B, B, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(factors.lora_A, A, rtol=1e-4, atol=1e-6)

    @staticmethod
    def step(before, uploads):
        phi = np.array([np.linalg.norm(B @ A) for B, A, _ in uploads])
        phi /= phi.sum()
        new_B, new_A = np.zeros_like(before[0]), np.zeros_like(before[1])
        for weight, (B, A, _) in zip(phi, uploads, strict=True):
            new_B[:, : B.shape[1]] += weight * B
            new_A[: A.shape[0]] += weight * A
        dispatched = max(held for _, _, held in uploads)
        uploaded = max(B.shape[1] for B, _, _ in uploads)
        new_B[:, dispatched:] = before[0][:, dispatched:]
        new_A[uploaded:] = before[1][uploaded:]  # zero in B, but able to learn
        return new_B, new_A


@dataclass
class Words:
    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray


def words(rows: int = 64, length: int = 6, classes: int = 3) -> Words:
    generator = np.random.default_rng(2)
    tokens = generator.integers(1, 512, (rows, length)).astype(np.int32)
    labels = generator.integers(0, classes, rows)
    tokens[:, 0] = labels + 1
    return Words(tokens.ravel(), np.arange(0, rows * length + 1, length), labels)


@pytest.fixture(scope="module")
def classifier() -> LoraClassifier:
    return LoraClassifier(ClassifierSpec(BaseSpec(path="", random_weights=True), 3))


def learning_client(classifier: LoraClassifier, **settings) -> HetLora:
    strategy = HetLora(max_rank=4, **settings)
    strategy.options = run_options(head="frozen")
    start = initial_adapter(classifier.shapes(), 4, seed=0)
    generator = torch.Generator().manual_seed(5)
    strategy.global_adapter = start.map(
        lambda f: LoraFactors(f.lora_A, 0.1 * torch.randn(f.lora_B.shape, generator=generator))
    )
    return strategy


def tail_product(factors: LoraFactors, start: int) -> float:
    return float(factors.lora_B[:, start:].norm() * factors.lora_A[start:].norm())


class TestOnARealClient:
    """Pruning where it happens: in the client's training."""

    OPTIONS = TrainOptions(batch_size=16, learning_rate=1e-2)

    def rounds(self, classifier: LoraClassifier, count: int, **settings) -> list[dict[str, int]]:
        """Let one client train; return the ranks of its uploads by round."""
        strategy, uploads = learning_client(classifier, **settings), []
        for server_round in range(1, count + 1):
            plan = strategy.plan(Client(4, 64, 0).profile, server_round)
            sent = strategy.dispatch(plan)
            result = train(classifier, sent, plan, words(), self.OPTIONS, seed=server_round)
            uploads.append({n: f.rank for n, f in result.adapter.modules.items()})
            update = ClientUpdate(0, 64, plan, sent, result.adapter)
            strategy.global_adapter = Adapter(merge(strategy, [update]))
        return uploads

    def test_a_strong_regularizer_prunes_to_the_minimum_and_no_further(self, classifier):
        uploads = self.rounds(classifier, 4, decay=0.75, tail_weight=3.0, min_rank=2)
        totals = [sum(ranks.values()) for ranks in uploads]
        assert totals == sorted(totals, reverse=True)  # never grows
        assert set(uploads[0].values()) == {3}  # floor(0.75 * 4)
        assert set(uploads[1].values()) == set(uploads[-1].values()) == {2}

    def test_without_pruning_nothing_is_pruned(self, classifier):
        uploads = self.rounds(classifier, 2, decay=0.75, tail_weight=3.0, pruning=False)
        assert set(uploads[-1].values()) == {4}

    def test_without_the_regularizer_less_is_pruned(self, classifier):
        settings = {"decay": 0.75, "tail_weight": 3.0, "min_rank": 1}
        strong = self.rounds(classifier, 2, **settings)
        chance = self.rounds(classifier, 2, **settings, regularizer=False)
        assert sum(chance[-1].values()) > sum(strong[-1].values())

    def test_each_module_prunes_if_and_only_if_its_tail_shrank(self, classifier):
        strategy = learning_client(classifier, decay=0.75, tail_weight=0.003)
        plan = strategy.plan(Client(4, 64, 0).profile, 1)
        sent = strategy.dispatch(plan)
        whole, got = (
            train(classifier, sent, asked, words(), self.OPTIONS, seed=1).adapter.modules
            for asked in (replace(plan, tail=replace(plan.tail, prune=False)), plan)
        )
        shrank = {n: tail_product(whole[n], 3) < tail_product(sent.modules[n], 3) for n in whole}
        assert {n: f.rank for n, f in got.items()} == {n: 3 if shrank[n] else 4 for n in shrank}
        assert 2 <= sum(shrank.values()) <= len(shrank) - 2  # the rule had something to decide


class TestRun:
    def test_pruned_uploads_shrink_the_traffic(self, tmp_path):
        settings = ("strategy=hetlora", "ranks=homogeneous", "federation.num_clients=2")
        settings = (*settings, "strategy.decay=0.5", "strategy.tail_weight=5")
        up = {}
        for pruning in (True, False):
            folder = tmp_path / str(pruning)
            summary = run_tiny(folder, *settings, f"strategy.pruning={pruning}")
            up[pruning] = summary["bytes"]["train"]["up"]
        assert up[True] < 0.9 * up[False]
