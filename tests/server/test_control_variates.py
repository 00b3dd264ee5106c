"""SCAFFOLD: control variates of the clients, and the corrections that follow from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import MAX_RANK, Client, noise, run_options, strategy_named, update_of

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.server.aggregation import merge
from hafl_app.server.checkpoint_store import CheckpointStore
from hafl_app.server.compatibility import check_scaffold
from hafl_app.server.control_variates import ControlVariates
from hafl_app.server.method import StrategyError
from hafl_app.server.snapshot import Snapshot, flatten, restore, take_snapshot, unflatten
from hafl_app.server.update import ClientUpdate
from hafl_app.training.settings import ClientSettings

SGD = ClientSettings(learning_rate=0.1, lora_B_lr_ratio=3.0, optimizer="sgd", max_grad_norm=0.0)
STEPS = {0: 2, 1: 3, 2: 5}  # unequal, as the data of clients are
SCALING = 4.0  # the run's: lora_alpha / max_rank


def with_scaffold(name="rbla"):
    strategy = strategy_named(name)
    strategy.options = run_options(
        strategy.options,
        scaffold=True,
        **{n: getattr(SGD, n) for n in ("learning_rate", "lora_B_lr_ratio", "optimizer")},
    )
    return strategy


def targets_of(client, tensors):
    """Where a client's loss, half the squared distance to it, is least: not where others' is."""
    generator = np.random.default_rng(client.partition_id)
    return {name: generator.normal(size=tuple(t.shape)) for name, t in tensors.items()}


def rate_of(name):
    return 0.1 * 3.0 if name.startswith("lora_B") else 0.1


def trained(strategy, client, correction):
    """Take plain SGD steps on a client's own loss, with corrected gradients, in float64."""
    update = update_of(strategy, client, lambda factors, _: factors)
    steps, tensors = STEPS[client.partition_id], update.adapter.tensors()
    targets = targets_of(client, strategy.global_adapter.tensors())
    after = {}
    for name, tensor in tensors.items():
        numbers = tensor.double().numpy()
        target = targets[name][tuple(slice(n) for n in numbers.shape)]
        scale = SCALING if name.startswith("lora_B") else 1.0
        raw, added = numbers / scale, 0.0
        if correction is not None:
            added = correction.tensors()[name].double().numpy()
        for _ in range(steps):
            raw = raw - rate_of(name) * (raw - target + added)
        after[name] = torch.from_numpy(raw * scale).to(tensor.dtype)
    return replace(update, adapter=Adapter.from_tensors(after), steps=steps)


class Paper:
    """Algorithm 1 with option II for full participation; state on clients and server."""

    def __init__(self, clients, tensors):
        self.clients, self.c = clients, {n: np.zeros(t.shape) for n, t in tensors.items()}
        self.own = {k.partition_id: dict(self.c) for k in clients}
        self.w = {n: t.double().numpy() for n, t in tensors.items()}
        scales = {n: SCALING if n.startswith("lora_B") else 1.0 for n in tensors}
        self.w = {n: numbers / scales[n] for n, numbers in self.w.items()}
        self.scales = scales
        self.targets = {k.partition_id: targets_of(k, tensors) for k in clients}

    def round(self):
        weights = np.array([k.num_examples for k in self.clients], dtype=float)
        weights /= weights.sum()
        for name, w in self.w.items():
            ends, changes = [], []
            for client in self.clients:
                k, y = client.partition_id, w.copy()
                for _ in range(STEPS[k]):
                    gradient = y - self.targets[k][name]
                    y = y - rate_of(name) * (gradient - self.own[k][name] + self.c[name])
                new = self.own[k][name] - self.c[name] + (w - y) / (STEPS[k] * rate_of(name))
                changes.append(new - self.own[k][name])
                self.own[k] = {**self.own[k], name: new}
                ends.append(y)
            self.w[name] = sum(a * y for a, y in zip(weights, ends, strict=True))
            self.c[name] = self.c[name] + sum(changes) / len(self.clients)


class TestOracle:
    CLIENTS = (Client(MAX_RANK, 10, 0), Client(MAX_RANK, 25, 1), Client(MAX_RANK, 7, 2))

    def run(self, rounds, corrected=True):
        strategy = with_scaffold("fedit")
        paper = Paper(self.CLIENTS, strategy.global_adapter.tensors())
        for server_round in range(1, rounds + 1):
            plans = [strategy.plan(c.profile, server_round) for c in self.CLIENTS]
            variates = strategy.coordinator.control_variates
            corrections = [
                variates.correction(c.partition_id, p) if corrected else None
                for c, p in zip(self.CLIENTS, plans, strict=True)
            ]
            updates = [
                trained(strategy, c, correction)
                for c, correction in zip(self.CLIENTS, corrections, strict=True)
            ]
            strategy.coordinator._advance(server_round, updates)
            paper.round()
        return strategy, paper

    def test_rounds_are_the_papers(self):
        strategy, paper = self.run(rounds=4)
        for name, tensor in strategy.global_adapter.tensors().items():
            expected = paper.w[name] * paper.scales[name]
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-5)
        variates = strategy.coordinator.control_variates
        for partition_id, own in paper.own.items():
            for name, numbers in own.items():
                got = variates.own[partition_id][name].numpy()
                np.testing.assert_allclose(got, numbers, rtol=1e-3, atol=1e-4)

    def test_a_lower_learning_rate_makes_no_smaller_gradients(self):
        strategy = with_scaffold("fedit")
        update = trained(strategy, self.CLIENTS[1], None)
        variates = strategy.coordinator.control_variates
        lower = replace(SGD, learning_rate=SGD.learning_rate / 4)
        told = replace(update, plan=replace(update.plan, rates=(0.25,)))

        expected = variates.after(update, strategy.global_adapter, lower)

        for name, tensor in variates.after(told, strategy.global_adapter, SGD).items():
            torch.testing.assert_close(tensor, expected[name])

    def test_drift_is_gone_in_the_long_run(self):
        """Clients take 2, 3 and 5 steps: without corrections the mean is drawn to the last.

        Clients weigh by examples and variates equally, so with equal weights the rounds end where
        the sum of the losses is least, which is at the mean of the clients' targets.
        """
        self.CLIENTS = tuple(replace(client, num_examples=9) for client in self.CLIENTS)
        distances = []
        for corrected in (True, False):
            strategy = self.run(40, corrected)[0] if corrected else self.plain(40)
            tensors = strategy.global_adapter.tensors()
            targets = [targets_of(c, tensors)["lora_A/query"] for c in self.CLIENTS]
            best = sum(targets) / len(targets)
            distances.append(np.abs(tensors["lora_A/query"].numpy() - best).max())
        assert distances[0] < 1e-3
        assert distances[1] > 0.05

    def plain(self, rounds):
        strategy = strategy_named("fedit")
        for server_round in range(1, rounds + 1):
            updates = [trained(strategy, client, None) for client in self.CLIENTS]
            strategy.coordinator._advance(server_round, updates)
        return strategy


class TestMixedRanks:
    CLIENTS = (Client(2, 10, 0), Client(4, 25, 1))

    @pytest.fixture
    def after_one_round(self):
        strategy = with_scaffold()
        updates = [trained(strategy, client, None) for client in self.CLIENTS]
        strategy.coordinator._advance(1, updates)
        return strategy

    def correction(self, strategy, client):
        plan = strategy.plan(client.profile, 2)
        return strategy.coordinator.control_variates.correction(client.partition_id, plan)

    def test_a_component_of_one_client_alone_is_not_corrected(self, after_one_round):
        small, large = (self.correction(after_one_round, client) for client in self.CLIENTS)
        for name, factors in large.modules.items():
            assert factors.rank == 4
            assert small.modules[name].rank == 2
            assert factors.lora_A[:2].all()
            assert not factors.lora_A[2:].any()
            assert not factors.lora_B[:, 2:].any()
            torch.testing.assert_close(small.modules[name].lora_A, -factors.lora_A[:2])

    def test_a_client_that_has_not_trained_gets_none(self, after_one_round):
        assert self.correction(after_one_round, Client(4, 5, 7)) is None

    def test_a_client_that_now_trains_more_is_corrected_in_what_it_has_trained(
        self, after_one_round
    ):
        grown = self.correction(after_one_round, Client(3, 10, 0))
        assert grown.modules["query"].lora_A[:2].all()
        assert not grown.modules["query"].lora_A[2:].any()

    def test_a_factor_that_is_not_trained_is_not_sent(self):
        strategy = with_scaffold("ffa_lora")
        update = replace(update_of(strategy, Client(3, 10, 0), noise), steps=2)
        strategy.coordinator._advance(1, [update])
        plan = strategy.plan(Client(3, 10, 0).profile, 2)
        correction = strategy.coordinator.control_variates.correction(0, plan)
        for factors in correction.modules.values():
            assert factors.lora_A.shape == (3, 0)
            assert factors.lora_B.shape[1] == 3

    @pytest.mark.parametrize("head", ["frozen", "local"])
    def test_a_head_that_does_not_travel_has_none(self, head):
        strategy = with_scaffold()
        strategy.options = run_options(strategy.options, head=head)
        update = replace(update_of(strategy, Client(3, 10, 0), noise), steps=2)
        update = replace(update, adapter=update.adapter.with_head({}))
        strategy.coordinator._advance(1, [update])
        correction = self.correction(strategy, Client(3, 10, 0))
        assert not correction.head


class TestMemory:
    def after(self, rounds):
        strategy = with_scaffold("hafl")
        for server_round in range(1, rounds + 1):
            self.next_round(strategy, server_round)
        return strategy

    def next_round(self, strategy, server_round):
        updates = []
        for client in (Client(2, 10, 0), Client(4, 25, 1)):
            plan = strategy.plan(client.profile, server_round)
            variates = strategy.coordinator.control_variates
            with torch.random.fork_rng():
                torch.manual_seed(server_round)
                update = update_of(strategy, client, noise, server_round)
            added = variates.correction(client.partition_id, plan)
            if added is not None:  # anything that depends on it, to the last bit
                modules = {
                    n: LoraFactors(f.lora_A + added.modules[n].lora_A, f.lora_B)
                    for n, f in update.adapter.modules.items()
                }
                update = replace(update, adapter=Adapter(modules, update.adapter.head))
            updates.append(replace(update, steps=3))
        strategy.coordinator._advance(server_round, updates)

    def test_a_resumed_run_goes_on_bit_for_bit(self, tmp_path):
        whole = self.after(2)
        snapshot = take_snapshot(whole)
        CheckpointStore(tmp_path).save(2, flatten(snapshot.tree), dict(snapshot.state))
        self.next_round(whole, 3)

        resumed, read = with_scaffold("hafl"), CheckpointStore(tmp_path).latest()
        restore(resumed, Snapshot(unflatten(read.tensors), read.state))
        self.next_round(resumed, 3)

        theirs = resumed.global_adapter.tensors()
        for name, tensor in whole.global_adapter.tensors().items():
            assert torch.equal(theirs[name], tensor), name

    def test_a_round_that_fails_leaves_no_trace(self):
        strategy = self.after(1)
        before = strategy.coordinator.control_variates

        def breaking():
            yield replace(update_of(strategy, Client(2, 10, 0), noise), steps=2)
            raise RuntimeError("too few replies")

        with pytest.raises(RuntimeError, match="too few"):
            strategy.coordinator._advance(2, breaking())
        assert strategy.coordinator.control_variates is before

    def test_without_the_setting_there_are_none(self):
        strategy = strategy_named("rbla")
        strategy.coordinator._advance(1, [update_of(strategy, Client(2, 10, 0), noise)])
        assert not strategy.coordinator.control_variates.own

    def test_merging_changes_no_update(self):
        strategy = with_scaffold()
        update = replace(update_of(strategy, Client(2, 10, 0), noise), steps=2)
        before = {name: tensor.clone() for name, tensor in update.adapter.tensors().items()}
        ControlVariates().after(update, strategy.global_adapter, SGD)
        merge(strategy, strategy.global_adapter, [update])
        for name, tensor in update.adapter.tensors().items():
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["flexlora", "fedex_lora", "flora"])
def test_methods_whose_components_are_new_each_round_are_refused(name):
    with pytest.raises(StrategyError, match=r"federation\.scaffold=true is refused for strategy="):
        with_scaffold(name).check([3, 3])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora_a2", "its clients choose what they train"),
        ("fedrot_lora", "its clients rotate what they upload"),
        ("flasc", "its uploads are sparse"),
    ],
)
def test_plans_that_hide_what_is_trained_are_refused(name, reason):
    strategy = with_scaffold(name)
    with pytest.raises(StrategyError, match=f"is refused for strategy={name}: {reason}"):
        check_scaffold(strategy, Client(3, 10, 0).profile)
    strategy.options = run_options(strategy.options, scaffold=False)
    check_scaffold(strategy, Client(3, 10, 0).profile)


def test_a_factor_that_the_client_keeps_has_none():
    strategy = with_scaffold("fedsa_lora")
    update = replace(update_of(strategy, Client(3, 10, 0), noise), steps=2)
    strategy.coordinator._advance(1, [update])
    plan = strategy.plan(Client(3, 10, 0).profile, 2)
    correction = strategy.coordinator.control_variates.correction(0, plan)
    for factors in correction.modules.values():
        assert factors.lora_B.shape == (0, 3)
        assert factors.lora_A.shape[0] == 3


class TestAmplifiedSketches:
    """FSLoRA's clients have the gradients of the global adapter times a gain of their rank."""

    CLIENTS = (Client(2, 10, 0), Client(MAX_RANK, 25, 1))

    def after_a_round(self, gradients):
        """Return strategy, plans and variates after steps along ``gain * gradients[client]``."""
        strategy = with_scaffold("fslora")
        start, own, plans = strategy.global_adapter, {}, {}
        for client in self.CLIENTS:
            k = client.partition_id
            plan = plans[k] = strategy.plan(client.profile, 1)
            modules = {}
            for name, module in plan.modules.items():
                before, of_A, of_B = start.modules[name].select(module.held), *gradients[k][name]
                held = list(module.held)
                way_A = STEPS[k] * rate_of("lora_A") * module.gain
                way_B = STEPS[k] * rate_of("lora_B") * module.gain * SCALING
                modules[name] = LoraFactors(
                    before.lora_A - way_A * of_A[held], before.lora_B - way_B * of_B[:, held]
                )
            sent = strategy.dispatch(plan)
            update = ClientUpdate(k, 9, plan, sent, Adapter(modules, sent.head), steps=STEPS[k])
            own[k] = ControlVariates().after(update, start, SGD)
        return plans, ControlVariates(own)

    def gradients(self, seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tuple(
                torch.randn(*s, generator=generator) for s in ((MAX_RANK, n), (m, MAX_RANK))
            )
            for name, (m, n) in {"query": (7, 5), "dense": (6, 9)}.items()
        }

    def test_clients_that_see_the_same_are_not_corrected(self):
        same = self.gradients(1)
        plans, variates = self.after_a_round({0: same, 1: same})
        assert len({m.gain for plan in plans.values() for m in plan.modules.values()}) == 2
        for k, plan in plans.items():
            for factors in variates.correction(k, plan).modules.values():
                torch.testing.assert_close(
                    factors.lora_A, torch.zeros_like(factors.lora_A), atol=1e-4, rtol=0
                )
                torch.testing.assert_close(
                    factors.lora_B, torch.zeros_like(factors.lora_B), atol=1e-4, rtol=0
                )

    def test_others_are_corrected_by_what_they_lack_times_their_gain(self):
        seen = {0: self.gradients(1), 1: self.gradients(2)}
        plans, variates = self.after_a_round(seen)
        correction = variates.correction(0, plans[0])
        for name, module in plans[0].modules.items():
            held = list(module.held)
            lacks = (seen[1][name][0] - seen[0][name][0])[held] / 2
            assert module.gain == 2
            torch.testing.assert_close(
                correction.modules[name].lora_A, 2 * lacks, atol=1e-4, rtol=1e-4
            )
