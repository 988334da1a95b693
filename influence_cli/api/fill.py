"""Fills the cache of a run."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from influence_cli.api.id_selection import IdSelection
    from influence_cli.api.opening import Opened
    from influence_cli.parallel.shards import Shard


class FilledSplit(NamedTuple):
    """Gradients of one split in the cache: one for each example and checkpoint."""

    split: str
    computed: int
    stored_before: int


def check_stores(cache: str | None) -> None:
    """Raises UsageProblem for --cache none."""
    from influence_cli.errors import UsageProblem

    if cache == "none":
        raise UsageProblem(
            "influence cache fills a cache, and --cache none stores nothing",
            "leave out --cache none, or name a folder",
        )


def fill_cache(
    opened: "Opened", queries: "IdSelection", train: "IdSelection", part: "Shard | None"
) -> list[FilledSplit]:
    """Compute and store the gradients that the cache lacks: of queries, then of training
    examples. A note tells how many.
    """
    from influence_cli.errors import counted

    fills = []
    checkpoints = opened.checkpoints
    query_ids = opened.ids("--queries", queries, "query")
    train_ids = opened.shard_ids(opened.ids("--train", train, "train"), part)
    for split, ids in (("query", query_ids), ("train", train_ids)):
        new = opened.gradients.ensure(split, checkpoints, list(opened.columns), ids)
        fills.append(FilledSplit(split, new, len(ids) * len(checkpoints) - new))
        opened.reporter.note(
            f"{split}: {counted(new, 'gradient')} computed, {fills[-1].stored_before:,} were "
            f"stored already ({counted(len(ids), 'example')}, "
            f"{counted(len(checkpoints), 'checkpoint')})"
        )
    opened.note_unverified()
    return fills
