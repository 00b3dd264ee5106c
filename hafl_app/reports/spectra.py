"""Energy of an adapter by singular value, from the files that a run saved."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from hafl_app.reports.records import UnreadableRunError

if TYPE_CHECKING:
    from hafl_app.lowrank.factors import LoraFactors

_FILE = "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")


def read_energy(folder: Path) -> pd.DataFrame:
    """Return the share of the squared norm in each singular value of the update.

    PEFT's scaling, one number a module, changes no share.

    Parameters
    ----------
    folder
        Of a run; its ``adapter`` is read, or the folder itself if it is an adapter's.

    Returns
    -------
    DataFrame
        A row a module and singular value: ``module``, ``value`` from 1, ``energy`` in [0, 1],
        NaN in a module whose update is 0. Empty where no adapter was saved.

    Raises
    ------
    UnreadableRunError
        If the file of the adapter cannot be read.
    """
    path = next((p for p in (folder / "adapter" / _FILE, folder / _FILE) if p.exists()), None)
    rows = []
    for module, factors in _read_factors(path).items() if path else ():
        from hafl_app.lowrank.svd import singular_values  # noqa: PLC0415  torch takes seconds

        squares = singular_values(factors).square()
        shares = squares / squares.sum()
        rows += [(module, place, share) for place, share in enumerate(shares.tolist(), start=1)]
    return pd.DataFrame(rows, columns=["module", "value", "energy"])


def _read_factors(path: Path) -> "dict[str, LoraFactors]":
    from safetensors.torch import load_file  # noqa: PLC0415  torch takes seconds

    from hafl_app.lowrank.factors import LoraFactors  # noqa: PLC0415

    try:
        named = {
            (found["module"], found["side"]): tensor
            for name, tensor in load_file(path).items()
            if (found := _FACTOR.fullmatch(name))
        }
        return {
            module: LoraFactors(tensor, named[module, "B"])
            for (module, side), tensor in named.items()
            if side == "A"
        }
    except Exception as error:  # safetensors has an error of its own, which is no ValueError
        line = " ".join(str(error).split())
        raise UnreadableRunError(f"{path}: no readable adapter: {line}") from error
