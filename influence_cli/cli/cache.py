"""influence cache: compute the missing gradients, ahead of scoring."""

from influence_cli.cli import command, options


@command("cache", example="influence cache my_run --train 0:10000 --layers head", ranks=True)
def cache(
    shared: options.Shared,
    queries: options.Queries = None,
    train: options.Train = None,
    shard: options.Shard = None,
) -> None:
    """Compute and keep the gradients that scoring will need; what is there already is left alone.

    Stopped at any moment, the same command goes on: at most one unit of work is lost.
    """
    from influence_cli.cli import specs
    from influence_cli.errors import UsageProblem

    if shared.cache == "none":
        raise UsageProblem(
            "influence cache fills a cache, --cache none keeps nothing",
            "leave it out, or name a folder",
        )
    specs.check_stdin(queries, train)
    part = specs.shard(shard)

    from influence_cli.cli.opening import open_shared

    opened = open_shared(shared)
    columns = list(opened.columns)
    for split, ids in (
        ("query", opened.ids("--queries", queries, "query")),
        ("train", opened.train_ids(train, part)),
    ):
        new = opened.gradients.ensure(split, opened.checkpoints, columns, ids)
        cached = len(ids) * len(opened.checkpoints) - new
        opened.reporter.note(
            f"{split}: {new:,} gradients computed, {cached:,} were there ({len(ids):,} examples, "
            f"{len(opened.checkpoints)} checkpoints)"
        )
    opened.ranks.close()
