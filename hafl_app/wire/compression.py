"""Compressed text: zlib with a dictionary of layouts and plans, and bounded reading.

The names of a small model's modules would outweigh what rounding to 8 bits saves.
"""

import zlib
from functools import lru_cache

# The dictionary of zlib; the most common words stand at the end. Both sides must have the same: a
# change here is a change of the wire format.
_WORDS = (
    b'"modules":["model.layers.0.self_attn.q_proj","model.layers.0.self_attn.k_proj",'
    b'"model.layers.0.self_attn.v_proj","model.layers.0.self_attn.o_proj",'
    b'"model.layers.0.mlp.gate_proj","model.layers.0.mlp.up_proj","model.layers.0.mlp.down_proj",'
    b'{"head":"averaged","importance":"smoothed","importance_smoothing":0.85,"probe_batches":0,'
    b'"tail":null,"local_epochs":1,"max_steps":0,"upload":"int8","error_feedback":true,'
    b'"modules":[["0-7","0-1",2.0,["encoder.layer.0.attention.self.query",'
    b'"encoder.layer.0.attention.self.key","encoder.layer.0.attention.self.value",'
    b'"encoder.layer.0.attention.output.dense","encoder.layer.0.intermediate.dense",'
    b'"encoder.layer.0.output.dense","encoder.layer.1.attention.self.query"'
    b'],"scored-modules":[],"num-scores":[],"ranks":[2,2,2,2],"in-features":[384,384,1536],'
    b'"out-features":[384,384,1536,384]}'
)


class CompressedTextError(ValueError):
    """Bytes that are not compressed text, or expand to too much."""


@lru_cache(maxsize=64)
def compress(text: str) -> bytes:
    """Compress text, cached: a federation sends the same few texts repeatedly."""
    compressor = zlib.compressobj(level=9, zdict=_WORDS)
    return compressor.compress(text.encode()) + compressor.flush()


def decompress(data: bytes, most_bytes: int) -> str:
    """Expand the bytes of `compress`.

    Parameters
    ----------
    most_bytes
        Length of the text in UTF-8 at which it is rejected; no more than that is ever expanded.

    Raises
    ------
    CompressedTextError
        If the bytes are damaged, cut off, followed by others, or expand to more than that.
    """
    reader = zlib.decompressobj(zdict=_WORDS)
    try:
        text = reader.decompress(data, most_bytes)
        if reader.unconsumed_tail or len(text) == most_bytes:
            raise CompressedTextError(f"expands to {most_bytes} bytes or more")
        if not reader.eof or reader.unused_data:
            raise CompressedTextError(
                f"{len(data)} bytes that end too {'late' if reader.eof else 'early'}"
            )
        return text.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise CompressedTextError(f"{len(data)} bytes are no compressed text: {error}") from error
