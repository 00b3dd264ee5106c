"""Adapters in GGUF, the format of llama.cpp.

The layout is that of llama.cpp's ``convert_lora_to_gguf.py``: ``adapter.lora.alpha`` once, and for
every module ``NAME.weight.lora_a`` of shape (rank, in_features) and ``NAME.weight.lora_b`` of shape
(out_features, rank), by llama.cpp's names of the base model's tensors. llama.cpp scales a product
by alpha over its own rank (``get_scale`` in ``llama-adapter.h``): every module is written with one
rank, which is alpha too.

Where llama.cpp rotates neighboring dimensions of a head and Transformers the two halves, its
conversion of the base model reorders the rows of q and k (``LlamaModel.permute`` in its
``conversion/llama.py``). What an adapter adds to these rows is in ``lora_b``, which is reordered
alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.metrics import CAUSAL_LM
from hafl_app.packages import require
from hafl_app.printable import printable
from hafl_app.training.adapter_files import StoredAdapter
from hafl_app.training.base_model import base_without_weights
from hafl_app.training.peft_format import largest_rank

GGUF_FILE: Final = "adapter.gguf"
TOLERANCE: Final = 1e-6
"""Largest error of a number of a product that is read back, as a share of the largest number."""
_LORA_A, _LORA_B = ".weight.lora_a", ".weight.lora_b"


class GgufError(RuntimeError):
    """A file that does not hold the adapter that was written."""


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp makes of a model type of Transformers."""

    name: str
    reorders_heads: bool = False


# By `model_type`: those whose linear layers llama.cpp leaves as they are, or reorders by heads.
# What it calls the tensors is in the gguf package.
_ARCHITECTURES: Final[Mapping[str, _Architecture]] = {
    "llama": _Architecture("llama", reorders_heads=True),
    "mistral": _Architecture("llama", reorders_heads=True),
    "smollm3": _Architecture("smollm3", reorders_heads=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "gemma": _Architecture("gemma"),
    "gemma2": _Architecture("gemma2"),
    "gemma3_text": _Architecture("gemma3"),
    "phi": _Architecture("phi2"),
    "phi3": _Architecture("phi3"),
}


@dataclass(frozen=True)
class GgufLayout:
    """Where an adapter's factors stand in a GGUF file.

    Parameters
    ----------
    architecture
        llama.cpp's name of the base model's architecture.
    names
        Module name to llama.cpp's name of the tensor, without ``.weight``.
    heads
        Heads by which the rows of a module are reordered, for those that are.
    """

    architecture: str
    names: Mapping[str, str]
    heads: Mapping[str, int]


def gguf_layout(stored: StoredAdapter) -> GgufLayout:
    """Return the layout of an adapter in GGUF.

    Raises
    ------
    hafl_app.packages.MissingPackageError
        If the package ``gguf`` is not installed.
    ValueError
        In one line, if llama.cpp cannot compute what the adapter does.
    hafl_app.training.locate.ModelError
        If the base model's configuration is not there.
    """
    base = stored.spec.base
    if base.task != CAUSAL_LM.name:
        raise ValueError(
            f"--gguf: the adapter's task is {base.task}, with a head; expected {CAUSAL_LM.name}: "
            "a GGUF adapter holds factors alone"
        )
    if base.num_layers is not None:
        raise ValueError(
            f"--gguf: the base model is cut to {base.num_layers} layers, and llama.cpp runs all; "
            "use --merge and convert the whole model"
        )
    require("gguf", "--gguf")
    config: Any = base_without_weights(base, 0).config
    known = _ARCHITECTURES.get(config.model_type)
    if known is None:
        raise ValueError(
            f"--gguf: no rule for the architecture {config.model_type}; expected one of "
            f"{', '.join(_ARCHITECTURES)}: use --merge and convert the whole model"
        )
    names = {module: _tensor_name(known, config, module) for module in stored.adapter.modules}
    return GgufLayout(known.name, names, _heads(known, config, names))


def _tensor_name(known: _Architecture, config: Any, module: str) -> str:
    import gguf  # noqa: PLC0415  optional

    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    found = gguf.get_tensor_name_map(number, config.num_hidden_layers).get_name(module)
    if found is None:
        raise ValueError(f"--gguf: llama.cpp has no tensor of {known.name} for the module {module}")
    return found


def _heads(known: _Architecture, config: Any, modules: Mapping[str, str]) -> dict[str, int]:
    if not known.reorders_heads:
        return {}
    number = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads or config.num_attention_heads,
    }
    ends = {module: module.rpartition(".")[2] for module in modules}
    return {module: number[end] for module, end in ends.items() if end in number}


def write_gguf(path: Path, stored: StoredAdapter, layout: GgufLayout, title: str) -> None:
    """Write an adapter in float32, and read it back.

    Parameters
    ----------
    title
        What the adapter is called in the file.

    Raises
    ------
    GgufError
        If a product that is read back is not the adapter's own, to `TOLERANCE`.
    OSError
        If it cannot be written.
    """
    from gguf import GGUFWriter, Keys, LlamaFileType  # noqa: PLC0415  optional

    rank = largest_rank(stored.adapter)
    writer = GGUFWriter(path, layout.architecture)
    writer.add_type("adapter")
    writer.add_name(printable(title))
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))
    for module, factors in stored.adapter.modules.items():
        padded = factors.padded(rank)
        lora_B = padded.lora_B[_order(module, layout, padded.out_features)]
        writer.add_tensor(layout.names[module] + _LORA_A, padded.lora_A.float().numpy(force=True))
        writer.add_tensor(layout.names[module] + _LORA_B, lora_B.float().numpy(force=True))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check(path, stored, layout)


def _order(module: str, layout: GgufLayout, rows: int) -> Tensor:
    """Return which row of Transformers' weight stands in each row of llama.cpp's."""
    order = torch.arange(rows)
    if heads := layout.heads.get(module):
        order = order.view(heads, 2, -1).transpose(1, 2).reshape(rows)
    return order


def read_gguf(path: Path) -> dict[str, LoraFactors]:
    """Read an adapter by llama.cpp's rules: tensor name to factors, scaled and in its row order.

    Raises
    ------
    GgufError
        If the file is no adapter, or factors are missing.
    """
    from gguf import GGUFReader, Keys  # noqa: PLC0415  optional

    reader = GGUFReader(path)
    kinds = ((Keys.General.TYPE, "adapter"), (Keys.Adapter.TYPE, "lora"))
    for key, expected in kinds:
        field = reader.get_field(key)
        if field is None or field.contents() != expected:
            raise GgufError(f"{path}: {key} is not {expected}")
    alpha = reader.get_field(Keys.Adapter.LORA_ALPHA)
    if alpha is None or not alpha.contents() > 0:  # llama.cpp would not scale at all
        raise GgufError(f"{path}: no {Keys.Adapter.LORA_ALPHA} above 0")
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    found = {}
    for name in [key.removesuffix(_LORA_A) for key in tensors if key.endswith(_LORA_A)]:
        lora_A, lora_B = tensors.pop(name + _LORA_A), tensors.pop(name + _LORA_B, None)
        if lora_B is None:
            raise GgufError(f"{path}: no {name}{_LORA_B}")
        found[name] = LoraFactors(lora_A, lora_B).scale(alpha.contents() / len(lora_A))
    if tensors:
        raise GgufError(f"{path}: unexpected tensor {min(tensors)}")
    return found


def _check(path: Path, stored: StoredAdapter, layout: GgufLayout) -> None:
    """Compare every product of a file with the adapter's own."""
    found = read_gguf(path)
    if set(found) != set(layout.names.values()):
        raise GgufError(f"{path}: {len(found)} modules, expected {len(layout.names)}")
    for module, factors in stored.adapter.modules.items():
        expected = factors.delta_weight()
        rows = _place(expected.shape[0], layout.heads.get(module))
        error = (found[layout.names[module]].delta_weight()[rows] - expected).abs().max()
        if not error <= TOLERANCE * expected.abs().max():
            raise GgufError(f"{path}: {module} is another product when read back, by {error:.2g}")


def _place(rows: int, heads: int | None) -> Tensor:
    """Return in which row of llama.cpp's weight each row of Transformers' stands.

    Of a head, row ``half * width / 2 + pair`` goes to row ``2 * pair + half``.
    """
    number = torch.arange(rows)
    if heads is None:
        return number
    width = rows // heads
    head, within = number // width, number % width
    half, pair = within // (width // 2), within % (width // 2)
    return head * width + 2 * pair + half
