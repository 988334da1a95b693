"""Scores of trak (methods/trak.py): Gram matrices of the margin's gradients, then products.

Letters: N train, Q query, P parts of a score, K projected numbers, B batch, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids, spread_evenly
from influence_cli.errors import DefinitionError, GradientError, UsageProblem
from influence_cli.extraction.label_losses import class_log_probs
from influence_cli.extraction.run_notes import report_numbers
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.joint_projection import JointProjection
from influence_cli.methods.inner_products import bytes_per_query
from influence_cli.methods.pair_products import PairProducts, Units
from influence_cli.methods.pairwise import (
    RankingFactory,
    mean_query_row,
    query_rows,
    rank_by_gradients,
)
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.methods.trak import TrakOptions
from influence_cli.progress import Advance
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure

MOST_NUMBERS = 2048  # K, where --project names none
EXAMPLES_PER_NUMBER = 4  # N / K at least, likewise
AUTO_RIDGE = 0.1  # of the mean eigenvalue
PART = 512  # examples whose features are in float64 at once
SAMPLE = 16  # examples whose losses are compared with outputs()
SINGLE_LABEL = "expected: -log of the probability that outputs() gives to one label"
OTHER_METHODS = "trak has no margin for other losses; --method tracin takes any loss"


@dataclass(frozen=True)
class Gram:
    """Phi^T Phi + lambda I at one checkpoint: its Cholesky factor (K, K), lower; `clipped`: number
    of training examples with a smaller 1 - p than float numbers resolve.
    """

    factor: Tensor
    ridge: float
    clipped: int


def score(
    source: GradientSource, request: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of every requested training example, ranked per query.

    Raises UsageProblem: more projected numbers than examples. DefinitionError: another loss than
    the cross-entropy of one label. GradientError: a singular Gram matrix.
    """
    joint = join_projections(source, request)
    check_losses(source, request.checkpoints[0])
    grams = fit_grams(source, request, joint)
    rows_of = mean_query_row if request.sum_queries else query_rows

    def read_queries(number: int, ids: Ids) -> GradientRows:
        return rows_of(source, request, request.checkpoints[number], ids)

    def prepare(number: int, rows: GradientRows, by_column: bool) -> Tensor:
        features_QK = joint.features(rows.forms).cpu()
        return torch.cholesky_solve(features_QK.T, grams[number].factor).T / len(grams)

    def add(
        totals_PQN: Tensor, number: int, queries_QK: Tensor, units: Units, advance: Advance
    ) -> bool:
        add_products(request, joint, totals_PQN, number, queries_QK, units, advance)
        return False

    products = PairProducts(bytes_per_query(source, request), read_queries, prepare, add)
    for ids, _, ranking in rank_by_gradients(source, request, new_ranking, products):
        queries = None if request.sum_queries else [int(query) for query in ids]
        yield ScoredQueries(queries, ranking, request.parts)


def add_products(
    request: ScoreRequest,
    joint: JointProjection,
    totals_PQN: Tensor,
    number: int,
    queries_QK: Tensor,
    units: Units,
    advance: Advance,
) -> None:
    """Add the products at checkpoint `number` to the scores of a block, and to their parts."""
    place, first = totals_PQN.device, 0
    queries_QK = queries_QK.to(place)
    columns_of = columns_by_part(request, number)
    for unit in units:
        for rows in unit.parts(PART):
            last = first + len(rows.ids)
            for part, names in columns_of.items():
                features_NK = joint.features(rows.forms, names).to(place)
                totals_PQN[part, :, first:last] += queries_QK @ features_NK.T
            first = last
            advance(len(rows.ids))


def columns_by_part(request: ScoreRequest, number: int) -> dict[int, list[str]]:
    """The columns whose products at checkpoint `number` make the score (0), and each part of it."""
    columns_of = {0: list(request.columns)}
    if request.by == "checkpoint":
        columns_of[1 + number] = list(request.columns)
    if request.by == "layer":
        for name, column in request.columns.items():
            columns_of.setdefault(1 + request.parts.index(column.layer), []).append(name)
    return columns_of


def join_projections(source: GradientSource, request: ScoreRequest) -> JointProjection:
    """The projection of all parameters together: of --project, or of K that fits the run."""
    count = len(source.run.train)
    fitting = 1 << max(0, (count // EXAMPLES_PER_NUMBER).bit_length() - 1)
    projection, default = source.settings.projection, min(MOST_NUMBERS, fitting)
    shapes = {name: column.shape for name, column in request.columns.items()}
    joint = JointProjection.of(shapes, projection, default, request.seed)
    if joint.numbers > count:
        raise UsageProblem(
            f"--project {joint.projection.numbers}: trak needs as many training examples as "
            "projected numbers, or its Gram matrix is singular",
            f"found: {count:,} training examples, {joint.numbers:,} numbers",
            f"--project {fitting}, or leave it out",
        )
    if projection is None:
        source.reporter.note(
            f"trak projects the gradients of all parameters to {joint.numbers:,} numbers; "
            "--project K chooses their number, and stores K numbers per parameter"
        )
    return joint


# ---------------------------------------------------------------- Gram matrices
def fit_grams(source: GradientSource, request: ScoreRequest, joint: JointProjection) -> list[Gram]:
    """The Gram matrix of all training examples at each checkpoint."""
    assert isinstance(request.options, TrakOptions)
    ids = range(len(source.run.train))
    source.ensure("train", request.checkpoints, list(request.columns), ids)
    least = 16 * torch.finfo(source.settings.precision).eps
    grams = []
    total = len(ids) * len(request.checkpoints)
    with source.reporter.progress("Gram matrices", total) as advance:
        for checkpoint in request.checkpoints:
            gram_KK, clipped = sum_products(source, request, checkpoint, joint, least, advance)
            factor, ridge = factorize(source, request, checkpoint, gram_KK)
            grams.append(Gram(factor, ridge, clipped))
    note_grams(source, request, grams, least)
    return grams


def sum_products(
    source: GradientSource,
    request: ScoreRequest,
    checkpoint: Checkpoint,
    joint: JointProjection,
    least: float,
    advance: Advance,
) -> tuple[Tensor, int]:
    """Phi^T Phi (K, K) float64 over all training examples, and how many have 1 - p < `least`."""
    gram_KK, clipped = torch.zeros(joint.numbers, joint.numbers, dtype=torch.float64), 0
    ids = range(len(source.run.train))
    for unit in source.read("train", checkpoint, list(request.columns), ids):
        refuse_negative(source, checkpoint, unit.ids, unit.losses, least)
        for rows in unit.parts(PART):
            doubt_N = -torch.expm1(-rows.losses.double())  # 1 - p
            clipped += int((doubt_N < least).sum())
            features_NK = joint.features(rows.forms)
            # -grad f: the sign does not matter in a product with itself
            features_NK /= doubt_N.clamp_min(least)[:, None].to(features_NK.device)
            gram_KK += (features_NK.T @ features_NK).cpu()
            advance(len(rows.ids))
    return gram_KK, clipped


def factorize(
    source: GradientSource, request: ScoreRequest, checkpoint: Checkpoint, gram_KK: Tensor
) -> tuple[Tensor, float]:
    """The Cholesky factor of the Gram matrix plus its ridge, and the ridge.

    Raises GradientError where the sum is singular within the precision of the gradients.
    """
    assert isinstance(request.options, TrakOptions)
    count = len(gram_KK)
    mean = float(gram_KK.trace()) / count
    if not mean:
        report_numbers(source, [checkpoint], list(request.columns))  # refuses gradients of zeros
    given = request.options.ridge
    ridge = AUTO_RIDGE * mean if given is None else given
    gram_KK.diagonal().add_(ridge)
    factor_KK, failed = torch.linalg.cholesky_ex(gram_KK)
    pivots = factor_KK.diagonal()
    rounding = max(2.0**-52, torch.finfo(source.settings.precision).eps ** 2)
    smallest, largest = float(pivots.min()) ** 2, float(pivots.max()) ** 2
    if int(failed) or not smallest > 4 * count * rounding * largest:  # True for NaN
        raise GradientError(
            f"trak: the Gram matrix at {checkpoint.name} is singular with --damping {ridge:g}",
            "found: projected gradients that depend on each other, as those of a softmax's bias, "
            "or examples that repeat",
            "--damping auto, or a smaller --project K",
        )
    return factor_KK, ridge


def note_grams(
    source: GradientSource, request: ScoreRequest, grams: list[Gram], least: float
) -> None:
    assert isinstance(request.options, TrakOptions)
    if request.options.ridge is None:
        ridges = sorted(gram.ridge for gram in grams)
        shown_ridge = f"{ridges[0]:.3g}"
        if len(ridges) > 1:
            shown_ridge += f" to {ridges[-1]:.3g} at {len(ridges)} checkpoints"
        source.reporter.note(
            f"--damping auto: {shown_ridge}, {AUTO_RIDGE} times the mean eigenvalue of the Gram "
            "matrix"
        )
    worst = max(range(len(grams)), key=lambda number: grams[number].clipped)
    if clipped := grams[worst].clipped:
        source.reporter.note(
            f"{clipped:,} of {len(source.run.train):,} training examples have 1 - p below "
            f"{least:.2g} at step {request.checkpoints[worst].step}: the Gram matrix takes "
            f"{least:.2g} for it; their own scores do not use it"
        )


# ---------------------------------------------------------------- the cross-entropy of one label
def check_losses(source: GradientSource, checkpoint: Checkpoint) -> None:
    """Compare the losses of a sample with the label probabilities of `outputs(model, batch)`.

    Raises DefinitionError where a loss is not -log of one of them.
    """
    definition = source.run.definition
    if not definition.has("outputs"):
        source.reporter.note(
            "trak assumes that loss() is the cross-entropy of one label: "
            f"{definition.path.name} has no outputs(model, batch) to compare it with"
        )
        return
    ids = np.array(spread_evenly(len(source.run.train), SAMPLE))
    batch, _ = source.extractor.batches.of("train", ids)
    model = source.run.model.at(checkpoint)
    values = []
    for name in ("outputs", "loss"):
        try:
            with torch.no_grad():
                values.append(definition.raw(name)(model, batch))
        except (Exception, SystemExit) as error:
            raise describe_failure(definition, name, error) from error
    source.run.model.at(source.run.checkpoints[0])  # where a probe expects the model
    outputs, losses_B = values
    log_probs_BC = label_log_probs(source, outputs, len(ids))
    if not isinstance(losses_B, Tensor) or losses_B.shape != (len(ids),):
        return  # which capturing gradients refuses
    losses_B = losses_B.double().cpu()
    distance_B = (log_probs_BC + losses_B[:, None]).abs().amin(1)
    eps = torch.finfo(source.settings.precision).eps
    allowed = 64 * eps * (1 + float(outputs.abs().max()) + losses_B.abs())
    wrong = (~(distance_B <= allowed)).nonzero().flatten().tolist()
    if wrong:
        example = int(ids[wrong[0]])
        raise not_single_label(
            source,
            f"found: example {example} of {source.run.train.source} has the loss "
            f"{float(losses_B[wrong[0]]):.6g} at {checkpoint.name}; no label has a probability of "
            f"exp(-loss)",
        )


def label_log_probs(source: GradientSource, outputs: object, count: int) -> Tensor:
    """(B, C) log-probabilities, float64. Raises DefinitionError where there are none."""
    log_probs_BC = class_log_probs(outputs, count)
    if log_probs_BC is None:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else ()
        raise not_single_label(
            source,
            f"found: outputs() returned {shape or type(outputs).__name__} for {count} examples; "
            f"expected: ({count}, C) logits of C classes, or ({count},) of two",
        )
    return log_probs_BC


def refuse_negative(
    source: GradientSource, checkpoint: Checkpoint, ids: np.ndarray, losses_N: Tensor, least: float
) -> None:
    """Raise DefinitionError for a loss below 0, beyond rounding."""
    wrong = (losses_N < -least).nonzero().flatten().tolist()
    if wrong:
        raise not_single_label(
            source,
            f"found: example {int(ids[wrong[0]])} of {source.run.train.source} has the loss "
            f"{float(losses_N[wrong[0]]):.6g} at {checkpoint.name}; a cross-entropy is at least 0",
        )


def not_single_label(source: GradientSource, finding: str) -> DefinitionError:
    name = source.run.definition.path.name
    return DefinitionError(
        f"trak: loss() in {name} is not the cross-entropy of one label",
        finding,
        SINGLE_LABEL,
        OTHER_METHODS,
    )
