"""Adapters on disk, in PEFT's format, with everything that is needed to use them again."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.renames import FACTS
from hafl_app.training.adapter_card import CARD_FILE, SavedAdapterError, read_card
from hafl_app.training.base_model import CAUSAL_LM, Tokenize, load_tokenizer
from hafl_app.training.lora_model import LoraModel, LoraSpec
from hafl_app.training.peft_format import (
    CLS_HEAD,
    PREFIX,
    WEIGHTS_FILE,
    factor_keys,
    factor_tensors,
    module_names,
    peft_config,
    tensor_keys,
    without_padding,
)
from hafl_app.training.settings import BaseSpec
from hafl_app.training.specs import lora_spec
from hafl_app.training.tensor_files import write_tensors

_HEAD = "head.safetensors"
_HEADS_BY_RANK = "heads_by_rank.safetensors"


@dataclass(frozen=True)
class StoredAdapter:
    """Contents of an adapter's folder, without its base model.

    Parameters
    ----------
    adapter
        Factors of every adapted module, PEFT's scaling folded in, and the head.
    spec
        Identity of the model that they belong to.
    label_names
        As in a `LoadedAdapter`.
    max_length
        Tokens at which texts are cut.
    facts
        Anything else worth knowing, as JSON values.
    heads_by_rank
        Heads of the adapter cut to a rank, where they are others than the whole one's.
    """

    adapter: Adapter
    spec: LoraSpec
    label_names: tuple[str, ...]
    max_length: int
    facts: Mapping[str, Any]
    heads_by_rank: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def head_at(self, rank: int) -> Mapping[str, Tensor]:
        """Return the head of the adapter cut to a rank."""
        return self.heads_by_rank.get(rank, self.adapter.head)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in its base model, ready to be used.

    Parameters
    ----------
    model
        Base model, factors and head: a classifier or a causal language model.
    tokenize
        From texts to token ids; it refuses them if the model classifies images.
    label_names
        Name of each class; of a causal language model, of each category of its data.
    facts
        Facts stored in the folder: base, pooling, training settings.
    """

    model: LoraModel
    tokenize: Tokenize
    label_names: tuple[str, ...]
    facts: Mapping[str, Any]


def save_adapter(
    folder: Path,
    adapter: Adapter,
    spec: LoraSpec,
    *,
    label_names: Sequence[str],
    max_length: int,
    facts: Mapping[str, Any] | None = None,
    heads_by_rank: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write an adapter; the folder appears whole or not at all.

    All modules are written with one rank, which ``lora_alpha`` equals, see
    `hafl_app.training.peft_format`; `read_adapter` returns each module with its own rank again.
    With mean pooling the factors belong to the bare encoder (``AutoModel``) and the head lies
    beside them; with ``cls`` the head is one of PEFT's ``modules_to_save`` and the folder needs
    nothing of this project, nor does that of a causal language model (``AutoModelForCausalLM``) or
    an image classifier (``AutoModelForImageClassification``).

    Parameters
    ----------
    folder
        Created; replaced if it exists.
    adapter
        Factors of every adapted module, and the head.
    max_length
        Tokens at which texts are cut.
    facts
        Anything else worth knowing, as JSON values.
    heads_by_rank
        See `StoredAdapter`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        _write(scratch, adapter, spec)
        if heads_by_rank:
            named = {f"{r}/{n}": t for r, head in heads_by_rank.items() for n, t in head.items()}
            write_tensors(scratch / _HEADS_BY_RANK, named)
        card = {
            "format": 1,
            "base": _base_facts(spec.base),
            "seed": spec.seed,
            "target_modules": spec.target_modules,
            "label_names": list(label_names),
            "max_length": max_length,
            "ranks": {name: factors.rank for name, factors in adapter.modules.items()},
            "facts": dict(facts or {}),
        }
        (scratch / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        scratch.replace(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write(folder: Path, adapter: Adapter, spec: LoraSpec) -> None:
    cls = _has_stock_head(spec.base)
    peft_config(adapter, spec.base, [CLS_HEAD] if cls else None).save_pretrained(str(folder))
    tensors = factor_tensors(adapter)
    if cls:
        tensors |= {f"{PREFIX}{CLS_HEAD}.{name}": tensor for name, tensor in adapter.head.items()}
    elif _has_own_head(spec.base):
        write_tensors(folder / _HEAD, adapter.head)
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})


def _has_stock_head(base: BaseSpec) -> bool:
    return base.task != CAUSAL_LM and base.pooling == "cls"


def _has_own_head(base: BaseSpec) -> bool:
    return base.task != CAUSAL_LM and base.pooling != "cls"


def read_adapter(path: str | Path, *, trust_remote_code: bool = False) -> StoredAdapter:
    """Read a saved adapter. Nothing of its base model is needed.

    Parameters
    ----------
    trust_remote_code
        See `load_adapter`.

    Raises
    ------
    SavedAdapterError
        If a file is missing or unreadable, or the factors' keys or shapes do not go together.
    """
    folder = Path(path)
    card = read_card(folder)
    try:
        base = _base_of(card["base"], trust_remote_code)
        targets, labels = card["target_modules"], tuple(card["label_names"])
        seed, max_length = int(card["seed"]), int(card["max_length"])
        facts = _renamed(card["facts"])
        # An earlier version stored every module by its own rank.
        ranks = {str(name): int(rank) for name, rank in card.get("ranks", {}).items()}
        tensors = load_file(folder / WEIGHTS_FILE)
        head = load_file(folder / _HEAD) if _has_own_head(base) else {}
        heads_by_rank = _heads_by_rank(folder / _HEADS_BY_RANK)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SavedAdapterError(f"{folder}: not a saved adapter: {error}") from error
    if _has_stock_head(base):
        prefix = f"{PREFIX}{CLS_HEAD}."
        head = {
            k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)
        }
    targets = targets if isinstance(targets, str) else tuple(targets)
    spec = lora_spec(base, len(labels), targets, seed=seed)
    adapter = Adapter(_factors(folder, tensors, ranks), head)
    return StoredAdapter(adapter, spec, labels, max_length, facts, heads_by_rank)


def _heads_by_rank(file: Path) -> dict[int, dict[str, Tensor]]:
    """Read the heads of cut adapters; none where the file is not there."""
    heads: dict[int, dict[str, Tensor]] = {}
    for key, tensor in (load_file(file) if file.exists() else {}).items():
        rank, name = key.split("/", 1)
        heads.setdefault(int(rank), {})[name] = tensor
    return heads


def _base_facts(base: BaseSpec) -> dict[str, Any]:
    # The shape is JSON within JSON in the files of this format.
    shape = json.dumps(base.shape, sort_keys=True) if base.shape else ""
    return {**asdict(base), "shape": shape}


def _base_of(facts: Mapping[str, Any], trust_remote_code: bool) -> BaseSpec:
    values = _renamed(facts)
    shape = json.loads(values["shape"]) if values.get("shape") else None
    return BaseSpec(**{**values, "shape": shape, "trust_remote_code": trust_remote_code})


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a folder's values under today's names."""
    return {FACTS.get(name, name): value for name, value in values.items()}


def load_adapter(path: str | Path, *, trust_remote_code: bool = False) -> LoadedAdapter:
    """Build the base model, and put a saved adapter and its head into it.

    Parameters
    ----------
    trust_remote_code
        Let the base model's repository run its own Python code. What the adapter's own files say
        of that does not count.

    Raises
    ------
    SavedAdapterError
        If a file is missing or unreadable, or a key is missing or unexpected.
    hafl_app.training.locate.ModelError
        If the base model is not there.
    """
    folder = Path(path)
    stored = read_adapter(folder, trust_remote_code=trust_remote_code)
    adapter, spec = stored.adapter, stored.spec
    # The seed decides whatever the base's files do not hold, random weights among them.
    model = spec.build()
    _check_keys(folder, tensor_keys(adapter.modules), tensor_keys(model.layers))
    if set(adapter.head) != set(model.initial_head):
        raise SavedAdapterError(
            f"{folder}: the head has {sorted(adapter.head)}, expected {sorted(model.initial_head)}"
        )
    try:
        model.load_whole(adapter)
    except (ValueError, RuntimeError) as error:
        raise SavedAdapterError(f"{folder}: does not fit the base model: {error}") from error
    tokenize = load_tokenizer(spec.base, stored.max_length)
    return LoadedAdapter(model.eval(), tokenize, stored.label_names, stored.facts)


def _factors(
    folder: Path, tensors: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> dict[str, LoraFactors]:
    names = module_names(tensors)
    _check_keys(folder, set(tensors), tensor_keys(names))
    factors = {}
    for name in names:
        lora_A, lora_B = (tensors[key] for key in factor_keys(name))
        try:
            factors[name] = without_padding(LoraFactors(lora_A, lora_B), ranks.get(name))
        except ValueError as error:
            raise SavedAdapterError(
                f"{folder}: does not fit the base model: module {name!r}: {error}"
            ) from error
    return factors


def _check_keys(folder: Path, found: set[str], expected: set[str]) -> None:
    if odd := sorted(expected ^ found):
        kind = "missing" if odd[0] in expected else "unexpected"
        raise SavedAdapterError(
            f"{folder}: {len(odd)} keys do not fit the base model, {kind}: {odd[0]}"
        )
