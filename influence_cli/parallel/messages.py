"""Messages between ranks: JSON, and arrays of numbers as NumPy writes them. Nothing is pickled, so
a message can hold no code.
"""

import io
import json
from typing import Any

import numpy as np

from influence_cli.parallel.ranks import Message

HEAD_BYTES = 8  # of the length of the JSON text


def encode_message(message: Message) -> bytes:
    """Raises TypeError for a value that a message can't hold."""
    arrays: list[np.ndarray] = []
    text = json.dumps(to_json(message, arrays)).encode()
    content = io.BytesIO()
    content.write(len(text).to_bytes(HEAD_BYTES, "little") + text)
    for array in arrays:
        np.lib.format.write_array(content, array, allow_pickle=False)
    return content.getvalue()


def decode_message(content: bytes) -> Message:
    """The message, with tuples as lists. Raises ValueError for anything else."""
    size = int.from_bytes(content[:HEAD_BYTES], "little")
    tree = json.loads(content[HEAD_BYTES : HEAD_BYTES + size])
    file = io.BytesIO(content)
    file.seek(HEAD_BYTES + size)
    arrays = []
    while file.tell() < len(content):
        arrays.append(np.lib.format.read_array(file, allow_pickle=False))
    return from_json(tree, arrays)


def to_json(message: Message, arrays: list[np.ndarray]) -> Any:
    """The message as JSON values; its arrays are added to `arrays`."""
    if message is None or isinstance(message, bool | int | float | str):
        return message
    if isinstance(message, np.ndarray):
        arrays.append(message)
        return {"array": len(arrays) - 1}
    if isinstance(message, range):
        return {"range": [message.start, message.stop, message.step]}
    if isinstance(message, list | tuple):
        return [to_json(part, arrays) for part in message]
    if isinstance(message, dict) and all(isinstance(key, str) for key in message):
        return {"dict": {key: to_json(part, arrays) for key, part in message.items()}}
    raise TypeError(f"a message can't hold a {type(message).__name__}")


def from_json(tree: Any, arrays: list[np.ndarray]) -> Message:
    if isinstance(tree, list):
        return [from_json(part, arrays) for part in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "array":
        return arrays[content]
    if kind == "range":
        return range(*content)
    return {key: from_json(part, arrays) for key, part in content.items()}
