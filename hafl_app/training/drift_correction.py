"""SCAFFOLD on a client: a fixed correction of every gradient of its training."""

from torch import Tensor, nn

from hafl_app.lowrank.factors import Adapter
from hafl_app.training.trainee import Trainee


class DriftCorrection:
    """The correction of one training's gradients.

    Parameters
    ----------
    trainee
        What is trained.
    correction
        What to add to the gradients of its trained components, in their order, and of its head:
        ``c - c_i`` of `hafl_app.server.control_variates`. None: nothing.
    """

    def __init__(self, trainee: Trainee, correction: Adapter | None) -> None:
        self._parts: list[tuple[nn.Parameter, Tensor]] = []
        if correction is None:
            return
        for name, (lora_A, lora_B) in trainee.trainable_factors().items():
            factors = correction.modules[name]
            self._parts += [(lora_A, factors.lora_A), (lora_B, factors.lora_B)]
        head = dict(trainee.head_module.named_parameters())
        self._parts += [(head[name], tensor) for name, tensor in correction.head.items()]
        # A factor that is not uploaded has no correction, even if it is trained.
        trained = [(p, part) for p, part in self._parts if p.requires_grad and part.numel()]
        self._parts = [(p, part.to(p.device, p.dtype)) for p, part in trained]

    def add_gradient(self) -> None:
        """Add the correction to the gradients that a batch has left."""
        for parameter, part in self._parts:
            if parameter.grad is not None:
                parameter.grad.add_(part)
