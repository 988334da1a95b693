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
    from influence_cli.api import specs
    from influence_cli.api.fill import check_stores, fill_cache

    check_stores(shared.cache)
    specs.check_stdin(queries, train)
    part = specs.shard(shard)

    import_torch()
    from influence_cli.cli.opening import open_shared

    opened = open_shared(shared)
    fill_cache(opened, queries, train, part)
    opened.ranks.close()
