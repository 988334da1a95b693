"""The heavy half of influence functions: fits the curvature, maps the queries by its inverse."""

import math
from collections.abc import Iterator

import torch

from influence_cli.errors import UsageProblem, shown
from influence_cli.extraction.drawn_labels import DrawnBatches
from influence_cli.extraction.source import GradientSource
from influence_cli.methods import inner_products
from influence_cli.methods.influence import InfluenceOptions
from influence_cli.methods.inner_products import SquaredNorms
from influence_cli.methods.pairwise import RankingFactory
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.preconditioners.apply import Preconditioner
from influence_cli.preconditioners.fit import fit_maps


def score(
    source: GradientSource, request: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """The products of mapped query gradients with training gradients."""
    preconditioner = fit_preconditioner(source, request)
    return inner_products.score(
        source, request, new_ranking, preconditioner.apply, preconditioner.sqnorms
    )


def open_sqnorms(source: GradientSource, request: ScoreRequest) -> SquaredNorms:
    """g . (H + damping)^{-1} g of each parameter: the score of an example on itself."""
    return fit_preconditioner(source, request).sqnorms


def fit_preconditioner(source: GradientSource, request: ScoreRequest) -> Preconditioner:
    """The inverse curvature at the request's checkpoint. A note says what `auto` chose."""
    options = request.options
    assert isinstance(options, InfluenceOptions)
    damping = read_damping(options.damping)
    draws = draw_labels(source, request) if options.fisher == "true" else None
    columns = list(request.columns)
    maps = fit_maps(source, request.checkpoints[0], columns, options.curvature, draws)
    preconditioner = Preconditioner.of(maps, damping)
    if damping is None:
        values = preconditioner.damping.values()
        source.reporter.note(
            f"--damping auto: {min(values):.3g} to {max(values):.3g}, a tenth of the mean "
            "eigenvalue of each parameter"
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
