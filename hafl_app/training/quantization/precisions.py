"""Precisions of a quantized base model by name, and the package that some need.

Without torch: settings are checked before it is imported.
"""

from typing import Final

from hafl_app.packages import is_installed, missing

PRECISIONS: Final = ("nf4", "int8", "bf16")
"""Precisions from few bits to many."""

NOT_QUANTIZED: Final = "none"
BLOCKWISE: Final = "blockwise"
"""Each node chooses a precision for every block."""


class QuantizationError(ValueError):
    """A model that cannot be quantized as asked for, or not without a library."""


def require_library(quantization: str) -> None:
    """Refuse ``model.quantization`` where its package is missing.

    Raises
    ------
    QuantizationError
        In one line, with the command that installs it.
    """
    if quantization not in (NOT_QUANTIZED, "bf16") and not is_installed("bitsandbytes"):
        raise QuantizationError(missing("bitsandbytes", f"model.quantization={quantization}"))
