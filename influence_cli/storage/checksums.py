"""The one checksum of stored tensors."""

import hashlib
import json
from pathlib import Path

from influence_cli.errors import CheckpointError


def digest_tensors(path: Path) -> str:
    """sha256 of a safetensors file's tensors, with their names, dtypes and shapes.

    The metadata does not count: safetensors orders it at random, and a corrected learning rate
    changes no gradient.

    Raises CheckpointError for a file that was removed or damaged since its header was read.
    """
    try:
        with path.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"its header would have {length:,} bytes")
            head = json.loads(content.read(length))
            head.pop("__metadata__", None)
            digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
            while part := content.read(1 << 20):
                digest.update(part)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} changed or vanished during this command: {error}",
            "finished work is kept; save or copy it again and run the same command",
        ) from error
    return digest.hexdigest()
