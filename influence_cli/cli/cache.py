"""influence cache: compute the missing gradients, ahead of scoring."""

from pathlib import Path

from influence_cli.cli import app, options, reporting


@app.command(epilog="Example: influence cache my_run --train 0:10000 --layers head")
@reporting
def cache(
    run: options.Run = Path("."),
    queries: options.Queries = None,
    train: options.Train = None,
    steps: options.Steps = None,
    layers: options.Layers = None,
    precision: options.Precision = None,
    store: options.StoreAs = None,
    device: options.Device = "auto",
    batch_size: options.BatchSize = "auto",
    definition: options.Definition = None,
    checkpoints: options.Checkpoints = None,
    cache: options.CacheFolder = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compute and keep the gradients that scoring will need; what is there already is left alone.

    Stopped at any moment, the same command goes on: at most one unit of work is lost.
    """
    from influence_cli.cli import specs
    from influence_cli.errors import UsageProblem

    if cache == "none":
        raise UsageProblem("influence cache fills a cache, --cache none keeps nothing", "leave it out, or name a folder")
    specs.check_stdin(queries, train)

    from influence_cli.cli.opening import Shared, open_shared

    opened = open_shared(Shared(run, definition, checkpoints, None, cache, steps, layers, device, batch_size, precision, store, quiet))
    columns = list(opened.columns)
    for split, flag, spec in (("query", "--queries", queries), ("train", "--train", train)):
        ids = opened.ids(flag, spec, split)
        new = opened.gradients.ensure(split, opened.checkpoints, columns, ids)
        there = len(ids) * len(opened.checkpoints) - new
        opened.talk.note(
            f"{split}: {new:,} gradients computed, {there:,} were there ({len(ids):,} examples, {len(opened.checkpoints)} checkpoints)"
        )
