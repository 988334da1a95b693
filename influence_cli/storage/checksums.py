"""The one checksum of stored tensors."""

import hashlib
import json
from pathlib import Path


def digest_tensors(path: Path) -> str:
    """sha256 of a safetensors file's tensors, with their names, dtypes and shapes.

    The metadata does not count: safetensors orders it at random, and a corrected learning rate
    changes no gradient.
    """
    with path.open("rb") as content:
        head = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        head.pop("__metadata__", None)
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
