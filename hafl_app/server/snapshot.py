"""All that a strategy is between two rounds, as tensors and plain values for a checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.server.control_variates import ControlVariates
from hafl_app.server.coordinator import Strategy
from hafl_app.server.quarantine import Quarantine
from hafl_app.server.traffic import Ledger

_SEPARATOR = "\x1f"  # never in the name of a module, a parameter or a node


@dataclass(frozen=True)
class Snapshot:
    """A strategy after a round.

    Parameters
    ----------
    tree
        Dictionaries with tensors as leaves.
    state
        Plain values, as JSON has them.
    """

    tree: Mapping[str, Any]
    state: Mapping[str, Any]


def take_snapshot(strategy: Strategy) -> Snapshot:
    """Return the strategy as it is now, between two rounds."""
    coordinator, participation = strategy.coordinator, strategy.coordinator.participation
    tree = {
        "adapter": adapter_tree(strategy.global_adapter),
        "memory": strategy.memory(),
        "server_optimizer": coordinator.server_optimizer.memory(),
        "control_variates": coordinator.control_variates.memory(),
        "heads_of_ranks": {
            "/".join(map(str, ranks)): dict(head)
            for ranks, head in coordinator.closed_form.of_ranks.items()
        },
    }
    state = {
        "ledger": coordinator.ledger.to_json(),
        # By partition: Flower's node ids may be others when the run goes on.
        "quarantine": participation.quarantine.renamed(
            {p.node_id: p.partition_id for p in coordinator.directory.in_order()}
        ).to_json(),
        "rank_limits": {str(k): rank for k, rank in participation.rank_limits.items()},
        "train_loss": coordinator.train_loss,
        "heads": coordinator.closed_form.to_json(),
    }
    return Snapshot(tree, state)


def restore(strategy: Strategy, snapshot: Snapshot) -> None:
    """Restore a prepared strategy; the tree's branches without a leaf may be gone."""
    tree, state = snapshot.tree, snapshot.state
    coordinator, participation = strategy.coordinator, strategy.coordinator.participation
    strategy.global_adapter = adapter_of(tree["adapter"])
    strategy.recall(tree.get("memory", {}))
    coordinator.server_optimizer.recall(tree.get("server_optimizer", {}))
    coordinator.control_variates = ControlVariates.recalled(tree.get("control_variates", {}))
    coordinator.ledger = Ledger.from_json(state["ledger"])
    quarantine = strategy.options.federation.quarantine
    participation.quarantine = Quarantine.from_json(
        state["quarantine"], quarantine.after, quarantine.rounds
    ).renamed({p.partition_id: p.node_id for p in coordinator.directory.in_order()})
    participation.rank_limits = {int(k): rank for k, rank in state["rank_limits"].items()}
    coordinator.train_loss = state["train_loss"]
    coordinator.closed_form.recall(state.get("heads", ()))
    coordinator.closed_form.of_ranks = {
        tuple(map(int, ranks.split("/"))): head
        for ranks, head in tree.get("heads_of_ranks", {}).items()
    }


def adapter_tree(adapter: Adapter) -> dict[str, Any]:
    """Return an adapter as a tree of tensors."""
    modules = {n: {"lora_A": f.lora_A, "lora_B": f.lora_B} for n, f in adapter.modules.items()}
    return {"modules": modules, "head": dict(adapter.head)}


def adapter_of(tree: Mapping[str, Any]) -> Adapter:
    """Read what `adapter_tree` returned."""
    modules = {n: LoraFactors(f["lora_A"], f["lora_B"]) for n, f in tree["modules"].items()}
    return Adapter(modules, tree.get("head", {}))


def flatten(tree: Mapping[str, Any], separator: str = _SEPARATOR) -> dict[str, Any]:
    """Return the leaves of a tree of dictionaries by their path."""
    return {separator.join(path): leaf for path, leaf in _leaves(tree, ())}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tree that `flatten` was given, without branches that have no leaf."""
    tree: dict[str, Any] = {}
    for key, leaf in tensors.items():
        *branches, name = key.split(_SEPARATOR)
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[name] = leaf
    return tree


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, (*path, name))
        else:
            yield (*path, name), node
