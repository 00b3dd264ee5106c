"""Shapes of the base models that `conf/model` names, as in their published configurations."""

from typing import Any, Final

_LLAMA: Final[dict[str, Any]] = {"model_type": "llama", "tie_word_embeddings": True}
_SMOLLM2: Final[dict[str, Any]] = {**_LLAMA, "vocab_size": 49152}
_QWEN: Final[dict[str, Any]] = {"model_type": "qwen2", "vocab_size": 151936}


def _layers(width: int, inner: int, number: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": number,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
    }


CAUSAL: Final[dict[str, dict[str, Any]]] = {
    "smollm2": {**_SMOLLM2, **_layers(576, 1536, 30, 9, 3)},
    "gemma3_270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "head_dim": 256,
        "tie_word_embeddings": True,
        **_layers(640, 2048, 18, 4, 1),
    },
    "smollm2_360m": {**_SMOLLM2, **_layers(960, 2560, 32, 15, 5)},
    "qwen2_5_0_5b": {**_QWEN, "tie_word_embeddings": True, **_layers(896, 4864, 24, 14, 2)},
    "llama3_2_1b": {
        **_LLAMA,
        "vocab_size": 128256,
        "head_dim": 64,
        **_layers(2048, 8192, 16, 32, 8),
    },
    "qwen2_5_1_5b": {**_QWEN, "tie_word_embeddings": True, **_layers(1536, 8960, 28, 12, 2)},
    "smollm2_1_7b": {**_SMOLLM2, **_layers(2048, 8192, 24, 32, 32)},
    "phi4_mini": {
        "model_type": "phi3",
        "vocab_size": 200064,
        "pad_token_id": 199999,
        "tie_word_embeddings": True,
        **_layers(3072, 8192, 32, 24, 8),
    },
    "qwen2_5_7b": {
        **_QWEN,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        **_layers(3584, 18944, 28, 28, 4),
    },
}
"""Language models, the smallest first."""

ENCODERS: Final[dict[str, dict[str, Any]]] = {
    "distilbert_base": {"model_type": "distilbert"},
    "bert_base": {"model_type": "bert"},
    "roberta_base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    "modernbert_base": {"model_type": "modernbert"},
}
"""Encoders; what is not said is the default of their kind."""
