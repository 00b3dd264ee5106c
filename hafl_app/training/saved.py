"""Adapters on disk, in PEFT's format, with everything that is needed to use them again."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.training.base import BaseSpec, Tokenise, load_tokeniser
from hafl_app.training.classifier import ClassifierSpec, LoraClassifier

_WEIGHTS, _HEAD, _CARD = "adapter_model.safetensors", "head.safetensors", "hafl.json"
_PREFIX = "base_model.model."
_CLS_HEAD = "classifier"  # what encoders with a classification head call it


class SavedAdapterError(ValueError):
    """A folder that is no adapter saved by `save_adapter`, or does not fit its base model."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in its base model, ready to score texts.

    Parameters
    ----------
    classifier
        Base model, factors and head.
    tokenise
        From texts to token ids.
    label_names
        Name of each class.
    facts
        What the folder says of itself: base, pooling, training settings.
    """

    classifier: LoraClassifier
    tokenise: Tokenise
    label_names: tuple[str, ...]
    facts: Mapping[str, Any]


def save_adapter(
    folder: Path,
    adapter: Adapter,
    spec: ClassifierSpec,
    *,
    label_names: Sequence[str],
    max_length: int,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter; the folder appears whole or not at all.

    ``lora_alpha`` equals the rank in the saved config, so that PEFT's scaling is 1 and ``lora_B``
    is stored as the federation has it. With mean pooling the factors belong to the bare encoder
    (``AutoModel``) and the head lies beside them; with ``cls`` the head is one of PEFT's
    ``modules_to_save`` and the folder needs nothing of this project.

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
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        _write(scratch, adapter, spec)
        card = {
            "format": 1,
            "base": asdict(spec.base),
            "seed": spec.seed,
            "target_modules": spec.target_modules,
            "label_names": list(label_names),
            "max_length": max_length,
            "facts": dict(facts or {}),
        }
        (scratch / _CARD).write_text(json.dumps(card, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        scratch.replace(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write(folder: Path, adapter: Adapter, spec: ClassifierSpec) -> None:
    ranks = {name: factors.rank for name, factors in adapter.modules.items()}
    cls = spec.base.pooling == "cls"
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks if len(set(ranks.values())) > 1 else {},
        alpha_pattern=ranks if len(set(ranks.values())) > 1 else {},
        target_modules=list(ranks),
        task_type="SEQ_CLS" if cls else "FEATURE_EXTRACTION",
        modules_to_save=[_CLS_HEAD] if cls else None,
        base_model_name_or_path=spec.base.path,
        revision=spec.base.revision,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for name, factors in adapter.modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = factors.lora_A.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = factors.lora_B.contiguous()
    head = {name: tensor.contiguous() for name, tensor in adapter.head.items()}
    if cls:
        tensors |= {f"{_PREFIX}{_CLS_HEAD}.{name}": tensor for name, tensor in head.items()}
    else:
        save_file(head, folder / _HEAD)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


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
    hafl_app.training.base.ModelError
        If the base model is not there.
    """
    folder = Path(path)
    try:
        card = json.loads((folder / _CARD).read_text())
        base = BaseSpec(**{**card["base"], "trust_remote_code": trust_remote_code})
        targets, labels = card["target_modules"], tuple(card["label_names"])
        seed, max_length, facts = int(card["seed"]), int(card["max_length"]), card["facts"]
        tensors = load_file(folder / _WEIGHTS)
        head = load_file(folder / _HEAD) if base.pooling != "cls" else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SavedAdapterError(f"{folder}: not a saved adapter: {error}") from error
    # The seed decides whatever the base's files do not hold, random weights among them.
    spec = ClassifierSpec(
        base, len(labels), targets if isinstance(targets, str) else tuple(targets), seed=seed
    )
    classifier = LoraClassifier(spec)
    if base.pooling == "cls":
        prefix = f"{_PREFIX}{_CLS_HEAD}."
        head = {
            k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)
        }
    if set(head) != set(classifier.initial_head):
        raise SavedAdapterError(
            f"{folder}: the head has {sorted(head)}, expected {sorted(classifier.initial_head)}"
        )
    try:
        classifier.load_whole(Adapter(_factors(folder, tensors, classifier), head))
    except SavedAdapterError:
        raise
    except (ValueError, RuntimeError) as error:
        raise SavedAdapterError(f"{folder}: does not fit the base model: {error}") from error
    return LoadedAdapter(classifier.eval(), load_tokeniser(base, max_length), labels, facts)


def _factors(
    folder: Path, tensors: Mapping[str, Tensor], classifier: LoraClassifier
) -> dict[str, LoraFactors]:
    expected = {
        f"{_PREFIX}{name}.{factor}.weight"
        for name in classifier.layers
        for factor in ("lora_A", "lora_B")
    }
    if odd := sorted(expected ^ set(tensors)):
        kind = "missing" if odd[0] in expected else "unexpected"
        raise SavedAdapterError(
            f"{folder}: {len(odd)} keys do not fit the base model, {kind}: {odd[0]}"
        )
    return {
        name: LoraFactors(
            tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"]
        )
        for name in classifier.layers
    }
