"""Vectors whose inner products are scores of influence functions: mapped queries, plain gradients
of training examples.
"""

from influence_cli.extraction.source import GradientSource
from influence_cli.methods.gradient_vectors import VectorMaps
from influence_cli.methods.influence_scores import exact_inverse, fit_preconditioner, options_of
from influence_cli.methods.request import ScoreRequest
from influence_cli.preconditioners.kinds import EXACT


def open_vectors(source: GradientSource, request: ScoreRequest) -> VectorMaps:
    """Fits the curvature. Raises InfluenceError as `score` does."""
    if options_of(request).curvature in EXACT:
        return VectorMaps(exact_inverse(source, request).apply)
    preconditioner = fit_preconditioner(source, request)
    return VectorMaps(preconditioner.apply, preconditioner.sqnorms)
