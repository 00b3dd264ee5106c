"""Control variates of clients: SCAFFOLD on the factors.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv:1910.06378, Algorithm 1 with option II. A client's steps are ``w <- w - l (g - c_i + c)``, and
its variate after K of them is ``c_i - c + (w_sent - w) / (K l)``: the mean of its gradients g.

Differs from the paper: the server, which knows all of that but K, keeps the clients' variates and
sends each client the difference ``c - c_i``. A client then keeps nothing, uploads nothing more, and
a reply that does not count or a repeated round leaves no variate ahead of the adapter. ``c`` is the
mean over the clients that have trained the component, not over all: one that has not is not
corrected in it, where the paper would correct it against a variate of 0. Both are the same from the
second round on where all clients train the same in each.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.update import ClientUpdate
from hafl_app.training.settings import ClientSettings


class ControlVariates:
    """Every client's mean gradient when it last took part; never changed, but replaced.

    Parameters
    ----------
    own
        By partition, and by the names of `Adapter.tensors`: the client's variate in the shape of
        the global adapter, NaN where it has trained nothing yet. That of lora_B is of the gradient
        without PEFT's scaling, as the client's optimizer sees it; both without a plan's ``gain``,
        which differs between clients and is in their gradients alike.
    """

    def __init__(self, own: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        self.own = own or {}

    @cached_property
    def _mean(self) -> dict[str, Tensor]:
        """``c``: the mean over the clients that have one, number by number."""
        clients = [self.own[partition_id] for partition_id in sorted(self.own)]
        names = clients[0] if clients else ()
        return {n: torch.stack([own[n].double() for own in clients]).nanmean(0) for n in names}

    def correction(self, partition_id: int, plan: TrainPlan) -> Adapter | None:
        """Return ``c - c_i`` for what a plan trains, with its gain; None without a variate.

        Returns
        -------
        Adapter
            Float32: the trainable components in the plan's order, without a factor that is not
            uploaded, and the head if it travels. 0 where the client has no variate.
        """
        own = self.own.get(partition_id)
        if own is None:
            return None
        difference = {n: (c - own[n].double()).nan_to_num(nan=0.0) for n, c in self._mean.items()}
        whole = Adapter.from_tensors({n: part.float() for n, part in difference.items()})
        modules = {}
        for name, factors in whole.modules.items():
            module = plan.modules[name]
            part = factors.select(module.trainable).only(module.uploads)
            modules[name] = LoraFactors(module.gain * part.lora_A, module.gain * part.lora_B)
        return Adapter(modules, whole.head if plan.uploads_head else {})

    def after(
        self, update: ClientUpdate, previous: Adapter, client: ClientSettings
    ) -> dict[str, Tensor]:
        """Return a client's variate after its update: the mean of its gradients where it trained.

        They were taken at the learning rate of the update's round.

        Parameters
        ----------
        update
            From at least one step of plain SGD.
        previous
            The global adapter that it started from.
        client
            Of the run, for the learning rates.
        """
        own = dict(self.own.get(update.partition_id) or _unknown(previous))
        correction = self.correction(update.partition_id, update.plan)
        [share] = update.plan.rates
        rate, before = update.steps * share * client.learning_rate, update.before
        for name, after in update.adapter.modules.items():
            module, components = update.plan.modules[name], list(update.components(name))
            start = before.modules[name]
            added = correction.modules[name] if correction else _zeros(module.trainable, start)
            added = added.filled(_zeros(module.trainable, start)).select(range(after.rank))
            if module.uploads != "B":
                steps = (start.lora_A.double() - after.lora_A.double()) / rate
                lora_A = own[f"lora_A/{name}"].clone()
                lora_A[components] = ((steps - added.lora_A) / module.gain).to(lora_A.dtype)
                own[f"lora_A/{name}"] = lora_A
            if module.uploads != "A":
                rate_B = rate * client.lora_B_lr_ratio * module.scaling
                steps = (start.lora_B.double() - after.lora_B.double()) / rate_B
                lora_B = own[f"lora_B/{name}"].clone()
                lora_B[:, components] = ((steps - added.lora_B) / module.gain).to(lora_B.dtype)
                own[f"lora_B/{name}"] = lora_B
        for name, tensor in update.adapter.head.items():
            steps = (before.head[name].double() - tensor.double()) / rate
            head = correction.head[name] if correction else torch.zeros_like(tensor)
            own[f"head/{name}"] = (steps - head).to(tensor.dtype)
        return own

    def memory(self) -> dict[str, Any]:
        """Return all variates, for a checkpoint: a tree with tensors as leaves."""
        return {str(partition_id): dict(own) for partition_id, own in self.own.items()}

    @classmethod
    def recalled(cls, memory: Mapping[str, Any]) -> "ControlVariates":
        """Read what `memory` returned."""
        return cls({int(partition_id): own for partition_id, own in memory.items()})


def _unknown(adapter: Adapter) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in adapter.tensors().items()}


def _zeros(components: tuple[int, ...], like: LoraFactors) -> LoraFactors:
    rank = len(components)
    return LoraFactors(
        like.lora_A.new_zeros(rank, like.in_features),
        like.lora_B.new_zeros(like.out_features, rank),
    )
