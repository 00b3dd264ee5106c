"""The optimizer of a client's training, over what its plan trains and nothing else."""

import torch
from torch import nn

from hafl_app.plan import TrainPlan
from hafl_app.training.settings import TrainOptions
from hafl_app.training.task import TrainingError
from hafl_app.training.trainee import Trainee


def build_optimizer(
    model: Trainee, plan: TrainPlan, options: TrainOptions
) -> torch.optim.Optimizer:
    """Return the optimizer over the plan's trainable tensors, and nothing frozen."""
    pairs = list(model.trainable_factors().values())
    head = list(model.head_module.parameters()) if plan.trains_head else []
    groups = [
        {"params": [a for a, _ in pairs if a.requires_grad] + head, "lr": options.learning_rate},
        {
            "params": [b for _, b in pairs if b.requires_grad] + model.trainable_scales(),
            "lr": options.learning_rate * options.lora_B_lr_ratio,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TrainingError("the plan trains nothing: no components and a frozen head")
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, weight_decay=options.weight_decay)
    # Four times as fast as the loop over all tensors that is torch's default on the CPU.
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)


class Rates:
    """The learning rates of a training: those of the optimizer times its plan's `rates`.

    Parameters
    ----------
    optimizer
        At the rates of a plan without any.
    plan
        Whose parts are of equal length, in rows or in steps, whichever of its limits is nearer.
    num_rows
        Of the client's data.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, plan: TrainPlan, num_rows: int) -> None:
        self._groups = [(group, group["lr"]) for group in optimizer.param_groups]
        self._rates, self._most_steps = plan.rates, plan.max_steps
        self._most_rows = num_rows * plan.local_epochs
        self._rate = 1.0

    def before_step(self, steps: int, rows: int) -> None:
        """Set the rate of the next step.

        Parameters
        ----------
        steps, rows
            Taken so far; fewer than the limits.
        """
        part = rows * len(self._rates) // self._most_rows
        if self._most_steps:
            part = max(part, steps * len(self._rates) // self._most_steps)
        if self._rates[part] != self._rate:
            self._rate = self._rates[part]
            for group, peak in self._groups:
                group["lr"] = self._rate * peak


def take_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Make an optimizer step with the gradients clipped."""
    if max_grad_norm:
        nn.utils.clip_grad_norm_(parameters(optimizer), max_grad_norm)
    optimizer.step()


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return all that an optimizer steps on."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
