"""A linear head as weight and bias, and where it stands among the tensors of a model's head."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_WEIGHT, _BIAS = "weight", "bias"


@dataclass(frozen=True)
class LinearHead:
    """Logits ``weight x + bias`` of features x.

    Parameters
    ----------
    weight
        Shape ``(classes, features)``, float64.
    bias
        Shape ``(classes,)``, float64.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return logits ``(examples, classes)`` of features ``(examples, features)``, float64."""
        return features.to(self.weight.dtype) @ self.weight.T + self.bias

    def cooled(self, temperature: float) -> "LinearHead":
        """Return the head whose logits are these over a temperature, above 0."""
        return LinearHead(self.weight / temperature, self.bias / temperature)

    def unprojected(self, projection: Tensor | None) -> "LinearHead":
        """Return the head for features ``x`` of one that was solved for ``projection^T x``.

        Parameters
        ----------
        projection
            Shape ``(features, projected)``; None where nothing was projected.
        """
        if projection is None:
            return self
        return LinearHead(self.weight @ projection.T, self.bias)


def output_layer(head: Mapping[str, Tensor], num_classes: int) -> str:
    """Return the name of a head's output layer, empty if it is the head itself.

    The last matrix with a row a class, with its bias: ``out_proj`` of ``out_proj.weight``.

    Parameters
    ----------
    head
        Parameter name to tensor.

    Raises
    ------
    ValueError
        If there is none.
    """
    found = [
        prefix
        for name, tensor in head.items()
        if (prefix := _prefix(name)) is not None
        and tensor.ndim == 2
        and len(tensor) == num_classes
        and _joined(prefix, _BIAS) in head
    ]
    if not found:
        raise ValueError(
            f"the head has no linear layer with a bias and {num_classes} outputs; it has "
            f"{', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in head.items()) or '-'}"
        )
    return found[-1]


def feature_width(head: Mapping[str, Tensor], num_classes: int) -> int:
    """Return how many features the output layer reads."""
    return int(head[_joined(output_layer(head, num_classes), _WEIGHT)].shape[1])


def with_output_layer(head: Mapping[str, Tensor], solved: LinearHead) -> dict[str, Tensor]:
    """Return a head with another output layer, in the dtypes that it has.

    Raises
    ------
    ValueError
        If a number of the solved head is not finite.
    """
    if not (solved.weight.isfinite().all() and solved.bias.isfinite().all()):
        raise ValueError("the head that was solved has numbers that are not finite")
    prefix = output_layer(head, len(solved.bias))
    weight, bias = _joined(prefix, _WEIGHT), _joined(prefix, _BIAS)
    layer = {weight: solved.weight, bias: solved.bias}
    return dict(head) | {n: tensor.to(head[n].dtype).contiguous() for n, tensor in layer.items()}


def _prefix(name: str) -> str | None:
    prefix, _, last = name.rpartition(".")
    return prefix if last == _WEIGHT else None


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
