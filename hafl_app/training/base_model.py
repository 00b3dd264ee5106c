"""Load a frozen base model, its tokenizer, or its shapes alone."""

import contextlib
import copy
import functools
import logging
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
)

from hafl_app.training.base_dropout import switch_off_dropout, without_dropout
from hafl_app.training.locate import ModelError, locate, locate_without_weights
from hafl_app.training.quantization.blocks import quantize
from hafl_app.training.quantization.precisions import NOT_QUANTIZED, QuantizationError
from hafl_app.training.quiet_transformers import quiet_transformers
from hafl_app.training.settings import BaseSpec

_LOGGER = logging.getLogger(__name__)

Tokenize = Callable[[list[str]], list[list[int]]]

_TINY_VOCABULARY = 512
CAUSAL_LM = "causal_lm"
IMAGE_CLASSIFICATION = "image_classification"
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def _tiny_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_TINY_VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,  # no layer is square: a transposed factor must fail
        max_position_embeddings=128,
    )


def _tiny_bert() -> BertConfig:
    return BertConfig(
        vocab_size=_TINY_VOCABULARY,
        hidden_size=32,
        intermediate_size=48,  # not 32: a transposed factor must fail
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=128,
    )


def _config(spec: BaseSpec, num_labels: int) -> Any:
    if spec.is_without_files:
        config: Any = _shape(spec)
    else:
        with _refusing_code(spec):
            config = AutoConfig.from_pretrained(
                locate_without_weights(spec), trust_remote_code=spec.trust_remote_code
            )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.path={spec.path}: its weights are quantized already; give the model that they "
            "were made of, and model.quantization"
        )
    if spec.task == CAUSAL_LM:
        _require_causal(spec, config)
    if spec.num_layers is not None:
        layers = config.num_hidden_layers
        if spec.num_layers > layers:
            raise ModelError(f"model.num_layers={spec.num_layers}: the base model has {layers}")
        config.num_hidden_layers = spec.num_layers
    if spec.task == CAUSAL_LM:
        config.use_cache = False
    elif spec.pooling == "cls":
        config.num_labels = num_labels
    return config if spec.dropout else without_dropout(config)


def _shape(spec: BaseSpec) -> Any:
    """Return the configuration of a model without files."""
    if not spec.shape:
        if spec.task == IMAGE_CLASSIFICATION:
            raise ModelError("model.shape must be given for image_classification without a path")
        return _tiny_llama() if spec.task == CAUSAL_LM else _tiny_bert()
    try:
        return AutoConfig.for_model(**copy.deepcopy(spec.shape))
    except (ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(f"model.shape: no configuration of a model ({reason})") from error


def _require_causal(spec: BaseSpec, config: Any) -> None:
    """Refuse an encoder, which transformers would load as well: it sees the tokens it predicts."""
    names = getattr(config, "architectures", None) or []
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    causal = own_code or getattr(config, "is_decoder", False)
    if names and not causal and not any(name.endswith(_CAUSAL_ENDINGS) for name in names):
        raise ModelError(f"model.path={spec.path}: {names[0]} is no causal language model")


def base_without_weights(spec: BaseSpec, num_labels: int) -> PreTrainedModel:
    """Return the base model's layers on the meta device: shapes and names, no memory.

    Raises
    ------
    ModelError
        See `locate_without_weights`.
    """
    with torch.device("meta"):
        return _without_pooler(_from_config(_config(spec, num_labels), spec), spec)


def load_base(spec: BaseSpec, num_labels: int) -> PreTrainedModel:
    """Load the base model, frozen and in float32; with ``pooling=cls`` including its head.

    What ``spec.quantization`` asks for is rounded while the files are read; random weights are
    drawn as if it were not there, and then rounded. Without ``spec.dropout`` no layer of it drops
    anything, and its configuration says so.

    Raises
    ------
    ModelError
        See `locate`, or if the model cannot be quantized as asked for.
    """
    config = _config(spec, num_labels)
    _LOGGER.info("loading the base model %s", spec.path or "with random weights")
    try:
        model = _random(config, spec) if spec.random_weights else _from_weights(config, spec)
    except QuantizationError as error:
        raise ModelError(str(error)) from error
    if not spec.dropout:
        switch_off_dropout(model)
    return _without_pooler(model, spec).requires_grad_(False)


def _random(config: Any, spec: BaseSpec) -> Any:
    # A configuration may name half precision; weights from files are loaded in float32 as well.
    model = _from_config(config, spec).float()
    if spec.quantization != NOT_QUANTIZED:
        quantize(model, spec.quantization)
    return model


def _from_config(config: Any, spec: BaseSpec) -> Any:
    with _refusing_code(spec):
        return _auto(spec).from_config(config, trust_remote_code=spec.trust_remote_code)


def _from_weights(config: Any, spec: BaseSpec) -> Any:
    folder = locate(spec)
    if not list(folder.glob("*.safetensors")):
        # The older formats are pickles, which can carry code.
        raise ModelError(f"model.path={spec.path}: no weights in safetensors format")
    with _refusing_code(spec), quiet_transformers():
        return _auto(spec).from_pretrained(
            folder,
            config=config,
            dtype="float32",
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            **_while_loading(spec),
        )


def _while_loading(spec: BaseSpec) -> dict[str, Any]:
    if spec.quantization == NOT_QUANTIZED:
        return {}
    # Transformers' interface for it takes a while to import, and few runs need it.
    from hafl_app.training.quantization.loading import QuantizedBlocks  # noqa: PLC0415

    return {"quantization_config": QuantizedBlocks(spec.quantization)}


def _auto(spec: BaseSpec) -> Any:
    if spec.task == CAUSAL_LM:
        return AutoModelForCausalLM
    if spec.task == IMAGE_CLASSIFICATION:
        return AutoModelForImageClassification
    return AutoModelForSequenceClassification if spec.pooling == "cls" else AutoModel


def _without_pooler(model: Any, spec: BaseSpec) -> PreTrainedModel:
    if spec.pooling == "mean" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # nothing reads it, and it would be adapted in vain
    bare: PreTrainedModel = model
    return bare


@contextlib.contextmanager
def _refusing_code(spec: BaseSpec) -> Iterator[None]:
    """Name the setting that a model with code of its own would need."""
    try:
        yield
    except ValueError as error:
        if spec.trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"model.path={spec.path} needs Python code of its own: read it, then set "
            "model.trust_remote_code=true"
        ) from error


@functools.lru_cache(maxsize=4)
def load_tokenizer(spec: BaseSpec, max_length: int) -> Tokenize:
    """Return a function from texts to token ids, at most ``max_length`` each.

    The built-in random model has no vocabulary: it hashes words. That of an image classifier
    refuses every text.

    Raises
    ------
    ModelError
        See `locate`.
    """
    if spec.task == IMAGE_CLASSIFICATION:
        return _no_text
    if spec.is_without_files:
        return functools.partial(_hash_words, max_length=max_length)
    tokenizer = hub_tokenizer(spec)

    def tokenize(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(
            texts, truncation=True, max_length=max_length, return_attention_mask=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    return tokenize


def hub_tokenizer(spec: BaseSpec) -> Any:
    """Return the tokenizer of a base model with files.

    Raises
    ------
    ModelError
        See `locate`.
    """
    with _refusing_code(spec):
        return AutoTokenizer.from_pretrained(
            locate_without_weights(spec), trust_remote_code=spec.trust_remote_code
        )


def _no_text(texts: list[str]) -> list[list[int]]:
    raise ModelError(f"{len(texts)} texts for an image classifier, which reads none")


def hash_word(word: str) -> int:
    """Return the id of a word for a model without files, above 0."""
    return 1 + zlib.crc32(word.encode()) % (_TINY_VOCABULARY - 1)


def _hash_words(texts: list[str], max_length: int) -> list[list[int]]:
    return [[hash_word(word) for word in text.split()][:max_length] or [1] for text in texts]
