"""Layouts of messages, read and changed without the codec's checks."""

import json

from flwr.app import RecordDict

from hafl_app.wire.compression import compress, decompress


def layout_of(content: RecordDict) -> dict:
    """Return the layout as plain JSON values."""
    return json.loads(decompress(content["layout"]["layout"], 10**6))


def write_layout(content: RecordDict, values: object) -> None:
    """Let the layout say this."""
    content["layout"]["layout"] = compress(json.dumps(values))


def change_layout(content: RecordDict, **changes: object) -> None:
    """Change the layout's values under these keys, with - for _."""
    write_layout(content, layout_of(content) | {k.replace("_", "-"): v for k, v in changes.items()})
