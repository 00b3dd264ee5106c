"""A Llama of two layers in a GGUF file, as llama.cpp would write it."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

WORDS = ("a", "b", "c", "d", "Ġ", "ab", "Ġa", "Ċ")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("a b", "Ġ a")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
HIDDEN, FEED, HEADS, KV_HEADS, HEAD = 64, 96, 4, 2, 8  # no layer is square
SHAPES = {
    "attn_q": (HEADS * HEAD, HIDDEN),
    "attn_k": (KV_HEADS * HEAD, HIDDEN),
    "attn_v": (KV_HEADS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD),
    "ffn_gate": (FEED, HIDDEN),
    "ffn_up": (FEED, HIDDEN),
    "ffn_down": (HIDDEN, FEED),
}


def write_gguf(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write the file, and return the weights that it stands for by their names in it."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny llama")
    writer.add_license("mit")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*SPECIAL, *WORDS]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(WORDS))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(seed)
    held = {}
    embedding = rng.normal(size=(len(tokens), HIDDEN)).astype(np.float32)
    held["token_embd"] = _add(writer, "token_embd", embedding, GGMLQuantizationType.Q8_0)
    for block in range(2):
        for name, shape in SHAPES.items():
            full = f"blk.{block}.{name}"
            matrix = rng.normal(size=shape, scale=0.2).astype(np.float32)
            held[full] = _add(writer, full, matrix, GGMLQuantizationType.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _add(
    writer: GGUFWriter, name: str, weight: np.ndarray, kind: GGMLQuantizationType
) -> np.ndarray:
    packed = quants.quantize(weight, kind)
    writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    return quants.dequantize(packed, kind)
