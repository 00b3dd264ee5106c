"""A round of real training for the law of training: requests, `train()`, uploads, validation.

Without nodes and settings of a run: one model for all clients, and a few texts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from driving import BASE_RANK, made_of_cores, run_options, set_modules
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from training_factories import LABELS, TINY, random_adapter, random_rows

from hafl_app.client.own_factors import with_own_lora_B
from hafl_app.config.compose import compose
from hafl_app.config.schema import Settings
from hafl_app.engines.in_process import server_identity
from hafl_app.lowrank.cores import frozen_bases, with_cores
from hafl_app.lowrank.factors import Adapter, LoraFactors, ModuleShape
from hafl_app.plan import HeadPolicy, TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan, TrainedFactors
from hafl_app.run import build
from hafl_app.server.method import StrategyError
from hafl_app.server.round_messages import Reply, RoundMessages
from hafl_app.server.traffic import Ledger
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.strategies.core_mean import CoreMean
from hafl_app.training.adapter_arrays import from_arrays
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier
from hafl_app.training.core_linear import CoreLinear
from hafl_app.training.local import train
from hafl_app.training.lora_layers import FROZEN, TRAINABLE
from hafl_app.training.settings import TrainOptions
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import METRICS, NUM_EXAMPLES, adapter_content, read_adapter, read_plan
from hafl_app.wire.uploads import encode_upload

MAX_RANK = 4
EXAMPLES = (12, 9)
# Two layers of (48, 32) and one of (32, 48); each factor choice has one of them.
FACTORS: dict[str, TrainedFactors] = {
    "encoder.layer.0.intermediate.dense": "A",
    "encoder.layer.1.intermediate.dense": "B",
    "encoder.layer.0.output.dense": "both",
}
SPEC = ClassifierSpec(TINY, num_labels=LABELS, target_modules=tuple(FACTORS), seed=7)
OPTIONS = TrainOptions(batch_size=4, learning_rate=1e-2)
STEPS = 3

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """One client's part of a round.

    ``inside`` is what the model holds after training: by PEFT's adapter and module name,
    ``(lora_A, lora_B)`` with the scaling unfolded. ``head`` is its head.
    """

    plan: TrainPlan
    sent: Adapter
    inside: dict[str, dict[str, Pair]]
    head: dict[str, torch.Tensor]
    upload: RecordDict
    reply: Reply


def strategy_on(model: LoraClassifier, name: str, head: HeadPolicy) -> HeterogeneousLora:
    """Return the method of a file in conf/strategy with the settings that the file brings along.

    Its global adapter has no zeros: with lora_B at 0 lora_A would have no gradient. A method that
    changes the base has changed it.
    """
    settings = _settings(name)
    strategy = build.strategy(settings)
    strategy.options = run_options(build.run_options(settings), head=head, max_steps=STEPS)
    rank = MAX_RANK + BASE_RANK * strategy.traits.changes_base
    strategy.global_adapter = random_adapter(model, rank, seed=11)
    if isinstance(strategy, CoreMean):
        generator = torch.Generator().manual_seed(11)
        set_modules(strategy, made_of_cores(strategy, generator))
    if head == "frozen":  # it follows from the seed
        strategy.global_adapter = strategy.global_adapter.with_head(model.initial_head)
    return strategy


@lru_cache
def _settings(name: str) -> Settings:
    return compose([f"strategy={name}", f"lora.max_rank={MAX_RANK}"])


def profiles_for(strategy: HeterogeneousLora) -> list[NodeProfile]:
    """Return two clients, of different rank where the method serves that."""
    try:
        strategy.check(ranks := [2, MAX_RANK])
    except StrategyError:
        ranks = [3, 3]
    return [
        NodeProfile(i, 2, rank, examples, "cpu", node_id=70 + i)
        for i, (rank, examples) in enumerate(zip(ranks, EXAMPLES, strict=True))
    ]


def own_plan(plan: TrainPlan) -> TrainPlan:
    return plan


def one_module_per_choice(plan: TrainPlan) -> TrainPlan:
    """Return the plan with another choice of factors in each of the three modules."""
    modules = {name: _with_factors(m, FACTORS[name]) for name, m in plan.modules.items()}
    return replace(plan, modules=modules)


def _with_factors(module: ModulePlan, factors: TrainedFactors) -> ModulePlan:
    """Return the plan of a module with another choice of factors.

    A client that has its own lora_B uploads lora_A alone, whatever it trains; a core is trained
    as it is.
    """
    if module.core is not None or (module.own_lora_B and factors != "A"):
        return module
    return replace(module, factors=factors, own_lora_B=False)


def train_round(
    model: LoraClassifier, strategy: HeterogeneousLora, change: Callable[[TrainPlan], TrainPlan]
) -> list[Trained]:
    """Execute a changed plan on both clients, and judge their uploads."""
    profiles = profiles_for(strategy)
    plans = [change(strategy.plan(profile, 1)) for profile in profiles]
    exchange = RoundMessages(Ledger(), 1, MessageType.TRAIN)
    with server_identity():
        requests = exchange.messages(profiles, plans, strategy.dispatch, MessageType.TRAIN)
        for number, request in enumerate(requests):  # as a grid does when it sends them
            request.metadata.__dict__["_message_id"] = str(number)
        clients = [
            _train(model, request, profile)
            for request, profile in zip(requests, profiles, strict=True)
        ]
        judged = exchange.validate_training([reply for reply, _ in clients])
    return [
        # As it was executed: where the client chooses, after its choice.
        Trained(
            one.update.plan if one.update else plan,
            with_own_lora_B(RecordDict(), strategy.dispatch(plan), plan, model.shapes()),
            *after,
            reply.content,
            one,
        )
        for plan, (reply, after), one in zip(plans, clients, judged, strict=True)
    ]


def _train(
    model: LoraClassifier, request: Message, profile: NodeProfile
) -> tuple[Message, tuple[dict[str, dict[str, Pair]], dict[str, torch.Tensor]]]:
    """Do what a node does with a request; return the reply, and what the model then holds."""
    plan, arrays = read_plan(request.content), read_adapter(request.content)
    received = from_arrays(arrays.modules, arrays.head)
    received = with_own_lora_B(RecordDict(), received, plan, model.shapes())
    rows = random_rows(profile.num_examples, seed=profile.partition_id)
    result = train(model, received, plan, rows, OPTIONS, seed=1)
    upload = result.adapter if plan.head == "averaged" else result.adapter.with_head({})
    scores = {name: scores.numpy() for name, scores in result.importance.items()}
    encoded, _ = encode_upload(upload, received, result.plan, scores, {})
    metrics = MetricRecord({NUM_EXAMPLES: profile.num_examples, "loss": result.loss})
    reply = Message(adapter_content(encoded, **{METRICS: metrics}), reply_to=request)
    inside = {
        part: {name: _weights(layer, part) for name, layer in model.layers.items()}
        for part in (TRAINABLE, FROZEN)
    }
    return reply, (inside, model.head_state())


def _weights(layer: torch.nn.Module, part: str) -> Pair:
    """Return what a layer holds; in place of a lora_B that a core makes, the cores."""
    lora_A, linear_B = layer.lora_A[part].weight, layer.lora_B[part]
    lora_B = linear_B.cores() if isinstance(linear_B, CoreLinear) else linear_B.weight
    return lora_A.detach().clone(), lora_B.detach().clone()


def _start(client: Trained, name: str, part: str, slots: tuple[int, ...]) -> LoraFactors:
    """Return what a client held of these components, as `_weights` does."""
    sent, module = client.sent.modules[name], client.plan.modules[name]
    if module.core is None:
        return sent.select(slots)
    shapes = {n: ModuleShape(48, 32) for n in FACTORS} | {
        "encoder.layer.0.output.dense": ModuleShape(32, 48)
    }
    bases = frozen_bases(shapes, module.core.rank, module.core.seed)[name].select(module.held)
    whole = with_cores(sent, bases).select(slots)
    return whole if part == FROZEN else LoraFactors(whole.lora_A, sent.lora_B[:, list(slots)])


# ---- the law -------------------------------------------------------------------------------


def check_training(client: Trained, initial_head: dict[str, torch.Tensor]) -> None:
    """Hold a client's training to its plan, in the model itself and component by component."""
    for name, module in client.plan.modules.items():
        for part, slots, trains_A, trains_B in (
            (TRAINABLE, module.trainable_slots, module.trains_A, module.trains_B),
            (FROZEN, module.frozen_slots, False, False),
        ):
            start = _start(client, name, part, slots)
            before = (start.lora_A, start.lora_B / module.scaling)
            after = client.inside[part][name]
            _check_moves(f"{name}: lora_A, {part}", before[0], after[0], moves=trains_A)
            _check_moves(f"{name}: lora_B, {part}", before[1].T, after[1].T, moves=trains_B)
    trains_head = client.plan.head in ("averaged", "local")
    for name, tensor in (client.sent.head or initial_head).items():
        assert torch.equal(client.head[name], tensor) != trains_head, f"head {name}"


def _check_moves(what: str, before: torch.Tensor, after: torch.Tensor, *, moves: bool) -> None:
    assert before.shape == after.shape, f"{what}: {after.shape} after, {before.shape} before"
    moved = (before != after).any(1)
    expected = "a component stays" if moves else "a component moves"
    assert bool((moved == moves).all()), f"{what}: {expected}"


def check_upload(client: Trained) -> None:
    """Hold an upload to its plan: what it carries, how large it is, what the server reads."""
    arrays = read_adapter(client.upload)
    assert client.reply.update is not None, client.reply.error
    update, before = client.reply.update, client.reply.update.before
    for name, module in client.plan.modules.items():
        lora_A, lora_B = arrays.modules[name]
        shape = client.sent.modules[name].out_features, client.sent.modules[name].in_features
        assert (lora_B.shape[0], lora_A.shape[1]) == module.uploaded_sides(shape), name
        start, after = before.modules[name], update.adapter.modules[name]
        moves_A, moves_B = module.uploads != "B", module.uploads != "A"
        _check_moves(f"{name}: lora_A read", start.lora_A, after.lora_A, moves=moves_A)
        if not module.own_lora_B:  # or the server has none
            _check_moves(f"{name}: lora_B read", start.lora_B.T, after.lora_B.T, moves=moves_B)
    assert bool(arrays.head) == (client.plan.head == "averaged")
    assert factor_bytes(client.upload, client.plan) == _planned_bytes(client)


def _planned_bytes(client: Trained) -> int:
    """Return the planned bytes of the upload, of modules that were pruned less."""
    shapes = {n: (f.out_features, f.in_features) for n, f in client.sent.modules.items()}
    left = {n: f.rank for n, f in client.reply.update.adapter.modules.items()}
    modules = {
        n: replace(m, trainable=m.trainable[: left[n]], bits=m.bits[: left[n]])
        for n, m in client.plan.modules.items()
    }
    planned = replace(client.plan, modules=modules).upload_bytes(shapes)
    if client.plan.tail is None:
        assert planned == client.plan.upload_bytes(shapes)
    return planned


def factor_bytes(content: RecordDict, plan: TrainPlan) -> int:
    """Return the bytes of the factors' numbers on the wire, with ``mixed`` also their scales."""
    data = content["arrays"]["factors"].data
    if plan.upload == "fp32":
        return len(data) - 10 - int.from_bytes(data[8:10], "little")  # the npy header
    return len(data) + (len(content["layout"]["scales"]) if plan.upload == "mixed" else 0)


def check_merged(before: Adapter, after: Adapter, clients: Iterable[Trained]) -> None:
    """Hold the next global adapter to the plans: what no client trained is as it was."""
    plans = [client.plan for client in clients]
    for name, start in before.modules.items():
        trains_A = any(plan.modules[name].uploads != "B" for plan in plans)
        trains_B = any(plan.modules[name].uploads != "A" for plan in plans)
        end: LoraFactors = after.modules[name]
        assert torch.equal(start.lora_A, end.lora_A) != trains_A, f"{name}: merged lora_A"
        assert torch.equal(start.lora_B, end.lora_B) != trains_B, f"{name}: merged lora_B"
    for name, tensor in before.head.items():
        trained = any(plan.head == "averaged" for plan in plans)
        assert torch.equal(tensor, after.head[name]) != trained, f"merged head {name}"
