"""Which layers of a base model are adapted."""

from collections.abc import Iterable

from torch import nn

from hafl_app.training.locate import ModelError


def resolve_targets(
    model: nn.Module, target_modules: str | Iterable[str], head: nn.Module
) -> list[str]:
    """Return the full names of the layers to adapt.

    Parameters
    ----------
    target_modules
        ``all-linear`` (every linear layer but the head and the pooler), or ends of names, as in
        PEFT: ``query`` matches ``encoder.layer.0.attention.self.query``.

    Raises
    ------
    ModelError
        If a name matches no linear layer; the message lists the names there are.
    """
    skip = {id(module) for module in head.modules()}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in skip and "pooler" not in name
    ]
    if target_modules == "all-linear":
        return linear
    wanted = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    chosen: list[str] = []
    for ending in wanted:
        matches = [n for n in linear if n == ending or n.endswith(f".{ending}")]
        if not matches:
            endings = sorted({n.rsplit(".", 1)[-1] for n in linear})
            raise ModelError(
                f"lora.target_modules: no linear layer is named {ending!r}; there are "
                f"{', '.join(endings)}, or all-linear"
            )
        chosen += [n for n in matches if n not in chosen]
    return chosen
