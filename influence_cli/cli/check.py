"""influence check: are the gradients right, and is the cache whole?"""

from influence_cli.cli import command, options


@command("check", example="influence check my_run --layers head")
def check(
    shared: options.Shared,
    train: options.Train = None,
    queries: options.Queries = None,
    target_correlation: options.TargetCorrelation = None,
    format: options.Format = None,
    output: options.Output = None,
) -> None:
    """Are the gradients right on this model, and is the cache whole? Exit code 1 where not.

    Takes gradients of a few examples by the fast way and by plain autograd, in other batches,
    again, and summed; reads every file of the cache. One row per check and parameter: the worst
    error, relative, and the rounding that is allowed. With --project, or with a --store narrower
    than the precision, scores of a sample of pairs are compared with exact ones: the error, and
    what theory allows.
    """
    from influence_cli.cli import specs
    from influence_cli.errors import InfluenceError
    from influence_cli.output.columns import CHECK_COLUMNS
    from influence_cli.output.tables import TableWriter

    sink = TableWriter.open(format, output)
    specs.check_stdin(queries, train)
    target = specs.target(target_correlation)

    from influence_cli.cli.opening import open_shared
    from influence_cli.diagnostics.fidelity import fidelity_findings
    from influence_cli.diagnostics.gradient_check import findings

    opened = open_shared(shared, create=False, searched=target is not None)
    ids = {
        "train": opened.ids("--train", train, "train"),
        "query": opened.ids("--queries", queries, "query"),
    }
    columns = list(opened.columns)
    results = findings(opened.gradients, opened.checkpoints, columns, ids)
    results += fidelity_findings(
        opened.gradients, opened.checkpoints, columns, ids, shared.projection, target
    )
    rows = [
        (f.check, f.split, f.subject, "ok" if f.passed else "FAILED", f.error, f.allowed, f.note)
        for f in results
    ]
    sink.write(rows, CHECK_COLUMNS)
    frozen = [
        name
        for name, parameter in opened.run.model.module.named_parameters()
        if not parameter.requires_grad
    ]
    if frozen:
        opened.reporter.note(
            f"{len(frozen)} frozen parameters have no gradients: "
            f"{', '.join(frozen[:8])}{', ...' if len(frozen) > 8 else ''}"
        )
    failed = [f for f in results if not f.passed]
    if failed:
        raise InfluenceError(
            f"{len(failed)} of {len(results)} checks failed",
            *(
                f"{f.check} of {f.split} examples: {f.subject}{f' ({f.note})' if f.note else ''}"
                for f in failed[:8]
            ),
            *([f"and {len(failed) - 8} more"] if len(failed) > 8 else []),
            *(
                ["a target that is missed asks for a larger --project K; the last row names one"]
                if any(f.check == "target" for f in failed)
                else []
            ),
            *(
                [
                    "scores of these parameters can't be trusted; --layers '!NAME' leaves one out; "
                    "a damaged cache file may be deleted"
                ]
                if any(f.check != "target" for f in failed)
                else []
            ),
        )
