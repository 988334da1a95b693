"""Checks that a folder of embeddings belongs to this run, plan and options."""

import dataclasses
import hashlib
import json

import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import spread_evenly
from influence_cli.cache.identity import check_rows_agree, checkpoint_key
from influence_cli.cache.unit_file import report_damage
from influence_cli.errors import CacheError, listed
from influence_cli.methods.reverse.embedding_store import EmbeddingStore
from influence_cli.methods.reverse.saved_file import read_saved
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.storage.atomic import read_json, report_disk_errors, write_json

FORMAT, VERSION = "influence-embeddings", 2
OWN_FILES = ("embeddings.json", "sample.safetensors")
SAMPLE_STEPS = (0, 0)  # it belongs to no step
SAMPLE_SIZE = 8  # training examples that detect a change of the definition


def check_identity(store: EmbeddingStore) -> None:
    """Compare the folder with this run; a new or empty folder becomes this run's.

    Raises CacheError where the folder holds something else.
    """
    path = store.folder / "embeddings.json"
    identity = describe_identity(store)
    store.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    digest = store.source.run.definition.digest
    with report_disk_errors(store.folder):
        entries = [entry.name for entry in store.folder.iterdir()]
    if path.is_file():
        stored = read_json(path, f"delete {store.folder} to recompute it")
        definition = stored.pop("definition", "")
        compare_identities(store, stored, identity)
        if definition != digest:
            compare_samples(store)
        return
    # a job that is starting, or was killed at its start, has written the sample only
    if any(not name.startswith(".tmp-") and name not in OWN_FILES for name in entries):
        raise CacheError(
            f"{store.folder} holds other files",
            "choose an empty or a new folder with --embeddings DIR",
        )
    write_sample(store)
    with report_disk_errors(store.folder):
        write_json(path, identity | {"definition": digest})


def describe_identity(store: EmbeddingStore) -> dict[str, object]:
    """What the embeddings depend on, besides the definition."""
    source, plan, options = store.source, store.plan, store.options
    memory = source.cache_folder / "checkpoints.json" if source.cache_folder else None
    groups = [(group.names, sorted(group.options.items())) for group in plan.trajectory.groups]
    checkpoints = [*(segment.checkpoint for segment in plan.segments), plan.end]
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(store.dtype),
        "precision": source.settings.key,
        "curvature": options.curvature,
        "renormalize": options.renormalize,
        "parameters": store.widths,
        "optimizer": repr((plan.trajectory.optimizer, groups)),
        "steps": [plan.steps.start, plan.steps.stop],
        "trajectory": trajectory_digest(plan),
        "checkpoints": [checkpoint_key(checkpoint, memory) for checkpoint in checkpoints],
    }


def trajectory_digest(plan: ReversePlan) -> str:
    """The digest of the steps: examples, weights, learning rates and clipping."""
    digest = hashlib.sha256()
    for step in plan.steps:
        line, weights = plan.trajectory.lines[step], plan.trajectory.weights(step)
        content = (step, line.lr, line.clip, line.examples.tolist(), weights.tolist())
        digest.update(repr(content).encode())
    return digest.hexdigest()


def compare_identities(
    store: EmbeddingStore, stored: dict[str, object], identity: dict[str, object]
) -> None:
    """Raise CacheError naming what differs."""
    different = [key for key in identity if stored.get(key) != identity[key]]
    if different:
        raise CacheError(
            f"{store.folder} holds embeddings of another run or request: {listed(different)} "
            f"{'differs' if len(different) == 1 else 'differ'}",
            *(
                f"{key}: {shorten(stored.get(key))} in the folder, {shorten(identity[key])} now"
                for key in different[:3]
            ),
            "choose another folder with --embeddings DIR, or delete this one to recompute it",
        )


def compute_sample(store: EmbeddingStore) -> GradientRows:
    """Losses and norms of a few training examples at the first checkpoint."""
    segment, run = store.plan.segments[0], store.source.run
    examples = store.plan.examples(segment)
    ids = examples[spread_evenly(len(examples), SAMPLE_SIZE)]
    rows = store.source.extractor.rows_at(
        segment.checkpoint, "train", list(store.plan.columns), ids, "norms"
    )
    return dataclasses.replace(rows, digests=run.train.digests(ids))


def write_sample(store: EmbeddingStore) -> None:
    sample = compute_sample(store)
    content = {
        "losses": sample.losses,
        "digests": sample.digests,
        "ids": torch.from_numpy(sample.ids),
    }
    content |= {f"{name}:sqnorms": value for name, value in sample.sqnorms.items()}
    store.write(
        store.folder / "sample.safetensors", content, store.describe("sample", SAMPLE_STEPS)
    )


def compare_samples(store: EmbeddingStore) -> None:
    """The definition's text changed: raise CacheError if the sample changed, too."""
    path = store.folder / "sample.safetensors"
    content = read_saved(path, store.describe("sample", SAMPLE_STEPS))
    with report_damage(path):
        norms = {name: content[f"{name}:sqnorms"] for name in store.plan.columns}
        ids = content["ids"].numpy()
        stored = GradientRows(ids, content["losses"], content["digests"], norms, {})
    check_rows_agree(
        stored,
        compute_sample(store),
        store.source.settings.rounding,
        store.plan.segments[0].checkpoint.name,
        "train",
        store.folder,
    )
    store.source.reporter.note(
        f"the definition changed after {store.folder} was written; {len(stored.ids)} training "
        "gradients are the same, so its embeddings are used"
    )


def shorten(value: object) -> str:
    """The text of a value, up to 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
