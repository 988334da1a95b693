"""The heavy half of influence functions: maps the queries by the inverse of the curvature."""

import math
import time
from collections.abc import Iterator

import torch

from influence_cli.errors import UsageProblem, counted, shown
from influence_cli.extraction.drawn_labels import DrawnBatches
from influence_cli.extraction.source import GradientSource
from influence_cli.methods import inner_products
from influence_cli.methods.influence import InfluenceOptions
from influence_cli.methods.inner_products import SquaredNorms
from influence_cli.methods.pairwise import RankingFactory
from influence_cli.methods.position_split import check_position_parts
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.preconditioners.apply import Preconditioner
from influence_cli.preconditioners.exact_inverse import TOLERANCE, ExactInverse
from influence_cli.preconditioners.fit import fit_maps
from influence_cli.preconditioners.kinds import EXACT, KINDS
from influence_cli.preconditioners.training_curvature import TrainingCurvature
from influence_cli.progress import format_bytes, format_duration


def score(
    source: GradientSource, request: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """The products of mapped query gradients with training gradients."""
    is_exact = options_of(request).curvature in EXACT
    check_position_parts(source, request, mapped=not is_exact)
    if is_exact:
        inverse = exact_inverse(source, request)
        return inner_products.score(source, request, new_ranking, inverse.apply)
    preconditioner = fit_preconditioner(source, request)
    return inner_products.score(
        source, request, new_ranking, preconditioner.apply, preconditioner.sqnorms
    )


def open_sqnorms(source: GradientSource, request: ScoreRequest) -> SquaredNorms:
    """g . (H + damping)^{-1} g of each parameter: the score of an example on itself.

    Raises UsageProblem for exact curvature.
    """
    refuse_norms(options_of(request).curvature, "self-influence")
    return fit_preconditioner(source, request).sqnorms


def options_of(request: ScoreRequest) -> InfluenceOptions:
    assert isinstance(request.options, InfluenceOptions)
    return request.options


def refuse_norms(curvature: str, name: str) -> None:
    if curvature in EXACT:
        raise UsageProblem(
            f"{name} with --curvature {curvature} would need a solution for each training example",
            "choose --curvature ekfac, whose norms take one pass",
        )


def estimate_cost(source: GradientSource, request: ScoreRequest) -> str:
    """The cost of the curvature in one line, for `influence inspect`."""
    options, examples = options_of(request), f"all {len(source.run.train):,} training examples"
    if options.curvature not in EXACT:
        passes = 2 if KINDS[options.curvature].is_corrected else 1
        return f"{counted(passes, 'pass', 'passes')} over the gradients of {examples}"
    check_exact(source, request, options.curvature)
    curvature = TrainingCurvature(
        source, request.checkpoints[0], request.columns, options.curvature
    )
    queries = 1 if request.sum_queries else len(request.queries)
    rows = min(queries, curvature.rows_at_once)
    u_KP = torch.ones(rows, curvature.size, dtype=torch.float64, device=curvature.place)
    curvature.product(u_KP)  # warms up
    started = time.perf_counter()
    curvature.product(u_KP)
    seconds = format_duration(time.perf_counter() - started)
    return (
        f"products with the curvature of {examples}, {counted(rows, 'query', 'queries')} at once: "
        f"{seconds} each, and tens to hundreds of them for each of "
        f"{counted(-(-queries // rows), 'block')}; {format_bytes(curvature.solver_bytes(rows))} in "
        "memory"
    )


def fit_preconditioner(source: GradientSource, request: ScoreRequest) -> Preconditioner:
    """The inverse of an approximation at the request's checkpoint. A note says what auto chose."""
    options = options_of(request)
    damping = read_damping(options.damping)
    draws = draw_labels(source, request) if options.fisher == "true" else None
    columns = list(request.columns)
    maps = fit_maps(source, request.checkpoints[0], columns, options.curvature, draws)
    preconditioner = Preconditioner.of(maps, damping)
    if damping is None:
        values = preconditioner.damping.values()
        source.reporter.note(
            f"--damping auto: {min(values):.3g} to {max(values):.3g}, a tenth of the mean "
            "eigenvalue of each block"
        )
    return preconditioner


def draw_labels(source: GradientSource, request: ScoreRequest) -> DrawnBatches:
    """One label per training example, drawn from the model. Raises DefinitionError."""
    eps = torch.finfo(source.settings.precision).eps
    batches, checkpoint = source.extractor.batches, request.checkpoints[0]
    draws = DrawnBatches(batches, request.seed, checkpoint, eps)
    source.reporter.note(
        f"--fisher true: {len(source.run.train):,} labels, one per training example, drawn from "
        f"{draws.describes}, with --seed {request.seed}"
    )
    return draws


def exact_inverse(source: GradientSource, request: ScoreRequest) -> ExactInverse:
    """By a solver. Raises UsageProblem for gradients or products that are not exact."""
    options = options_of(request)
    damping = read_damping(options.damping)
    check_exact(source, request, options.curvature)
    curvature = TrainingCurvature(
        source, request.checkpoints[0], request.columns, options.curvature
    )
    return ExactInverse.of(curvature, options.solver or "cg", damping, request.seed)


def check_exact(source: GradientSource, request: ScoreRequest, curvature: str) -> None:
    if request.normalize:
        refuse_norms(curvature, "--normalize")
    settings = source.settings
    if settings.projection is not None:
        raise UsageProblem(
            f"--project does not apply to --curvature {curvature}: it multiplies exact gradients",
            "leave out --project, or choose --curvature ekfac",
        )
    dtypes = {column.dtype for column in request.columns.values()} | {settings.precision}
    if settings.tf32 or not dtypes <= set(TOLERANCE):
        name = settings.precision_name
        raise UsageProblem(
            f"--curvature {curvature} needs float32 or float64 products, and this run has {name}"
            + (" parameters of several types" if settings.mixed else ""),
            "rounding would keep the solver from converging",
            "add --precision float32 or --precision float64",
        )


def read_damping(text: str) -> float | None:
    """None for auto. Raises UsageProblem."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageProblem(
            f"--damping {shown(text)}", "expected: auto, or a number above 0, such as 1e-4"
        )
    return value
