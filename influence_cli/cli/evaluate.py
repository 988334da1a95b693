"""influence evaluate: how well do scores predict what retraining does, on this run?"""

from typing import Annotated

from typer import Argument

from influence_cli.cli import command, options
from influence_cli.cli.method_options import flags_group
from influence_cli.evaluate.table import PROTOCOLS
from influence_cli.methods.table import METHODS

Protocol = Annotated[
    str,
    Argument(
        metavar="PROTOCOL",
        help="; ".join(f"{name}: {protocol.help}" for name, protocol in PROTOCOLS.items()) + ".",
    ),
]
Methods = Annotated[
    list[str] | None,
    options.option(
        "--method",
        metavar="NAME",
        panel=options.RANKED,
        help=f"Method to evaluate: {', '.join(METHODS)}. Repeatable.",
    ),
]
ProtocolFlags = flags_group(
    f"Options of {' and '.join(PROTOCOLS)}",
    {name: protocol.options for name, protocol in PROTOCOLS.items()}
    | {name: method.options for name, method in METHODS.items()},
    only=dict.fromkeys(name for protocol in PROTOCOLS.values() for name in protocol.flags),
)


@command("evaluate", example=next(iter(PROTOCOLS.values())).example)
def evaluate(
    shared: options.Shared,
    protocol_flags: ProtocolFlags,  # type: ignore[valid-type]  # made from PROTOCOLS
    protocol: Protocol,
    method: Methods = None,
    queries: options.Queries = None,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    trajectory: options.Trajectory = None,
    format: options.Format = None,
    output: options.Output = None,
) -> None:
    """How well do scores predict what retraining does, on this run? It really retrains.

    One row per method and query says how well the scores predicted the measured effects. Finished
    retrainings are stored. If it is interrupted, run the same command to resume.
    """
    from influence_cli.cli import specs
    from influence_cli.cli.method_options import build_options, given_flags
    from influence_cli.errors import UsageProblem
    from influence_cli.methods.declaration import option_texts
    from influence_cli.output import tables

    chosen = PROTOCOLS[specs.one_of("PROTOCOL", protocol, PROTOCOLS)]
    names = method or list(chosen.default_methods)
    methods = [METHODS[specs.one_of("--method", name, METHODS)] for name in names]
    sink = tables.TableWriter.open(format, output)
    given = given_flags(protocol_flags)
    own_options = build_options(
        chosen.options,
        {name: given[name] for name in option_texts(chosen.options) if name in given},
    )
    specs.check_seed(shared.seed)
    specs.check_rates(methods, lr, lr_weights)
    options_of = specs.options_of_methods(methods, given, chosen.options)
    for evaluated in methods:
        for flag, value in (("--project", shared.project), ("--layers", shared.layers)):
            reason = evaluated.reason_against(flag)
            if value and reason is not None:
                raise UsageProblem(
                    f"{flag} does not apply to --method {evaluated.name}: {reason}",
                    f"leave out {flag}",
                )

    from influence_cli.cli.opening import open_shared
    from influence_cli.cli.requests import score_request
    from influence_cli.evaluate.declaration import EvaluationRequest

    opened = open_shared(shared, trajectory)
    query_ids = opened.ids("--queries", queries, "query")
    requests = {
        evaluated.name: score_request(
            opened,
            evaluated,
            options_of[evaluated.name],
            train=range(0),
            queries=query_ids,
            rates=(lr, lr_weights),
            last_checkpoint=True,
        )
        for evaluated in methods
    }
    work = EvaluationRequest(
        requests, opened.checkpoints, query_ids, own_options, shared.seed or 0, opened.folder
    )
    sink.write(chosen.evaluate(opened.gradients, work), chosen.columns)
