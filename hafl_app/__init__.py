"""Federated LoRA fine-tuning when clients differ: a Flower app.

>>> from hafl_app import simulate
>>> result = simulate("strategy=flexlora", "dataset=banking77")  # doctest: +SKIP
>>> result.metrics, result.history, result.adapter  # doctest: +SKIP

Importing the package alone imports nothing else: nodes import it for every message.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hafl_app.commands.from_python import Result, simulate
    from hafl_app.training.adapter_files import load_adapter

__all__ = ["Result", "load_adapter", "simulate"]

_HOMES = {
    "Result": "hafl_app.commands.from_python",
    "simulate": "hafl_app.commands.from_python",
    "load_adapter": "hafl_app.training.adapter_files",
}


def __getattr__(name: str) -> Any:
    """Import what is public when it is used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
