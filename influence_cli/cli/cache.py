"""influence cache: compute the missing gradients, ahead of scoring."""

from influence_cli.cli import command, options
from influence_cli.cli.torch_import import import_torch


@command("cache", example="influence cache my_run --train 0:10000 --layers head", ranks=True)
def cache(
    shared: options.Shared,
    queries: options.Queries = None,
    train: options.Train = None,
    shard: options.Shard = None,
) -> None:
    """Compute and store the gradients that scoring needs. Stored gradients are not computed again.

    If it is interrupted, run the same command to resume. It loses at most the unit (cache file)
    that it was computing.
    """
    from influence_cli.cli import specs
    from influence_cli.errors import UsageProblem, counted

    if shared.cache == "none":
        raise UsageProblem(
            "influence cache fills a cache, and --cache none stores nothing",
            "leave out --cache none, or name a folder",
        )
    specs.check_stdin(queries, train)
    part = specs.shard(shard)

    import_torch()
    from influence_cli.cli.opening import open_shared

    opened = open_shared(shared)
    columns = list(opened.columns)
    for split, ids in (
        ("query", opened.ids("--queries", queries, "query")),
        ("train", opened.shard_ids(opened.ids("--train", train, "train"), part)),
    ):
        new = opened.gradients.ensure(split, opened.checkpoints, columns, ids)
        cached = len(ids) * len(opened.checkpoints) - new
        opened.reporter.note(
            f"{split}: {counted(new, 'gradient')} computed, {cached:,} were stored already "
            f"({counted(len(ids), 'example')}, {counted(len(opened.checkpoints), 'checkpoint')})"
        )
    opened.note_unverified()
    opened.ranks.close()
