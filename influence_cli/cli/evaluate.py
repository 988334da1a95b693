"""influence evaluate: are these scores any good, on this run?"""

from typing import Annotated

from typer import Argument

from influence_cli.cli import command, options
from influence_cli.evaluate import PROTOCOLS
from influence_cli.methods.table import METHODS

Protocol = Annotated[
    str,
    Argument(
        metavar="PROTOCOL",
        help="; ".join(f"{name}: {p.about}" for name, p in PROTOCOLS.items()) + ".",
    ),
]
Methods = Annotated[
    list[str] | None,
    options.option(
        "--method",
        metavar="NAME",
        panel=options.RANKED,
        help=f"{', '.join(METHODS)}; may be repeated (default dve, at the same removals).",
    ),
]
Removals = Annotated[
    int,
    options.option(
        "--removals",
        metavar="N",
        panel=options.NUMBERS,
        help="How many are left out, each in a training of its own.",
    ),
]


@command(
    "evaluate",
    example="influence evaluate my_run tsloo --method dve --method tracin --queries 0:50",
)
def evaluate(
    shared: options.Shared,
    protocol: Protocol,
    method: Methods = None,
    queries: options.Queries = None,
    removals: Removals = 100,
    curvature: options.Curvature = None,
    replay: options.Replay = False,
    renormalize: options.Renormalize = False,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    trajectory: options.Trajectory = None,
    format: options.Format = None,
    output: options.Output = None,
) -> None:
    """Are these scores any good, on this run? Measured by training again, for real.

    tsloo: single examples are left out of single steps of the recorded training; a row per method and query says how well its scores told
    what that did. Finished trainings are kept; a stopped command goes on where it was, and more --removals add to those there.
    """
    from influence_cli.cli import specs
    from influence_cli.errors import UsageProblem
    from influence_cli.output import tables

    chosen = PROTOCOLS[specs.one_of("PROTOCOL", protocol, PROTOCOLS)]
    methods = {name: METHODS[specs.one_of("--method", name, METHODS)] for name in method or ["dve"]}
    sink = tables.TableWriter.open(format, output)
    if removals < 2:
        raise UsageProblem(
            f"--removals {removals}", "expected: a number from 2; a correlation needs some"
        )
    if shared.seed is not None and shared.seed < 0:
        raise UsageProblem(f"--seed {shared.seed}", "expected: a number from 0")
    if (lr is not None or lr_weights is not None) and not any(
        asked.weighted for asked in methods.values()
    ):
        raise UsageProblem(
            f"--method {', '.join(methods)} has no learning-rate weights",
            "leave out --lr and --lr-weights",
        )
    known = {name for asked in methods.values() for name in asked.curvatures}
    if (curvature or replay) and not known:
        raise UsageProblem(
            f"--curvature, --replay: --method {', '.join(methods)} does not go by the order of training",
            "dve and unroll do",
        )
    if curvature is not None:
        specs.one_of("--curvature", curvature, known)
    for name, asked in methods.items():
        specs.check_words(name, asked.words, options.Words(), shared.layers)
        specs.check_projected(name, asked, shared.project)

    from influence_cli.cli.opening import open_shared
    from influence_cli.evaluate import EvaluationRequest
    from influence_cli.methods.declaration import Method, WordOptions
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.run.learning_rates import weigh_checkpoints

    opened = open_shared(shared, trajectory)
    query_ids = opened.ids("--queries", queries, "query")

    def question(asked: Method) -> ScoreRequest:
        selected = opened.checkpoints if asked.checkpoints == "all" else opened.checkpoints[-1:]
        return ScoreRequest(
            checkpoints=selected,
            weights=opened.weights(lr, lr_weights)
            if asked.weighted
            else tuple(weigh_checkpoints(selected, None, "none")),
            columns=opened.embedding(None) if asked.words else opened.columns,
            train=range(0),
            queries=query_ids,
            normalize=asked.normalized,
            words=WordOptions() if asked.words else None,
            values=asked.options(
                curvature=curvature if curvature in asked.curvatures else None,
                renormalize=renormalize,
                replay=replay,
            ),
        )

    questions = {name: question(asked) for name, asked in methods.items()}
    work = EvaluationRequest(
        questions,
        opened.checkpoints,
        query_ids,
        removals,
        shared.seed or 0,
        renormalize,
        opened.folder,
    )
    sink.write(chosen.run()(opened.gradients, work), chosen.columns)
