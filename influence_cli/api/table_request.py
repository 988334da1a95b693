"""The request that a table answers, for its record: `merge` compares it."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from influence_cli.api.opening import Opened
from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.identity import checkpoint_key
from influence_cli.parallel.shards import Shard

Described = dict[str, Any]  # Any: JSON values


def record_maker(
    opened: Opened,
    arguments: Described,
    train: Ids,
    queries: Ids,
    shard: Shard | None,
    top: int | None,
) -> Callable[[], Described]:
    """Returns a function that makes the record. It reads checkpoints, if no cache knows their
    digests. `train`: all ids, of which the shard has a part.
    """

    def make() -> Described:
        return {
            "request": {
                **{name: plain(value) for name, value in arguments.items()},
                **describe_run(opened),
                "train": digest_ids(train),
                "queries": digest_ids(queries),
            },
            "shard": [shard.index, shard.count] if shard else None,
            "top": top,
        }

    return make


def describe_run(opened: Opened) -> Described:
    """Digests of what the scores of a run depend on."""
    run, folder = opened.run, opened.folder
    memory = folder / "checkpoints.json" if folder is not None else None
    trajectory = None
    if run.trajectory_path is not None:
        with run.trajectory_path.open("rb") as file:
            trajectory = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "definition": run.definition.digest,
        "checkpoints": [checkpoint_key(checkpoint, memory) for checkpoint in opened.checkpoints],
        "trajectory": trajectory,
        "layers": hashlib.sha256("\n".join(opened.columns).encode()).hexdigest(),
        "settings": opened.gradients.settings.key,
        "seed": opened.seed,
        **{f"rows of {split}": rows.digest for split, rows in run.given.items()},
    }


def digest_ids(ids: Ids) -> str:
    """`START:STOP` of a range, else a digest."""
    if isinstance(ids, range):
        return f"{ids.start}:{ids.stop}"
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()


def plain(value: object) -> object:
    """An options dataclass as a dictionary, other values as they are or as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: plain(inner) for key, inner in dataclasses.asdict(value).items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)
