"""Solves (H + damping) x = v by products with H alone, for several right-hand sides v.

cg      conjugate gradients (Hestenes and Stiefel 1952)
lissa   the recursion of LiSSA (Agarwal et al. 2017, arXiv:1602.03943), with all training examples
        at each iteration: s <- v + (I - (H + damping) / c) s, and x = s / c

LiSSA is often written s <- v + (1 - d) s - H s / c. That solves (H + d c)^{-1}: its damping is d c,
not d. Here the damping is the one that results.

Letters: K right-hand sides, P numbers of all parameters together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.errors import GradientError

MOST_ITERATIONS = {"cg": 1_000, "lissa": 10_000}
GROWTH = 10.0  # of a residual, from its smallest, that shows divergence
REPEATED = 0.5  # what a new start from the true residual must make of it

Product = Callable[[Tensor], Tensor]  # (K, P) float64 -> H times each row
Report = Callable[[int, float], None]  # (iterations so far, the largest relative residual)


@dataclass(frozen=True)
class LinearSystem:
    """(H + damping) x = v. `tolerance`: of |v - (H + damping) x| / |v|."""

    product: Product
    damping: float
    tolerance: float
    report: Report = lambda iterations, residual: None

    def apply(self, values_KP: Tensor) -> Tensor:
        """(H + damping) of each row."""
        return self.product(values_KP).add_(values_KP, alpha=self.damping)


@dataclass(frozen=True)
class Solution:
    """`values`: (K, P). `residual`: the largest |v - (H + damping) x| / |v|, of these values."""

    values: Tensor
    residual: float
    iterations: int


class NegativeCurvature(GradientError):
    """H + damping is not positive along a direction, so its inverse answers no question."""

    def __init__(self, curvature: float, damping: float, solver: str) -> None:
        """`curvature`: u^T H u / u^T u of the direction."""
        super().__init__(
            f"--damping {damping:.6g} is too small: {solver} found a direction along which the "
            f"curvature is {curvature:.6g}",
            f"expected: a damping above {-curvature:.6g} for this direction; others may need more",
            f"--damping auto measures it, or choose a larger number, such as {-2 * curvature:.3g}",
            "--curvature gauss-newton has no negative curvature; --curvature ekfac neither",
        )


def not_converged(solver: str, residual: float, iterations: int, tolerance: float) -> GradientError:
    return GradientError(
        f"{solver} did not converge: relative residual {residual:.3g} after {iterations:,} "
        "iterations",
        f"expected: {tolerance:.3g} at most",
        "a larger --damping converges faster; --precision float64 has less rounding"
        + ("; --solver cg needs fewer iterations" if solver == "lissa" else ""),
    )


def row_norms(values_KP: Tensor) -> Tensor:
    """(K,) float64."""
    return torch.linalg.vector_norm(values_KP, dim=1)


def relative(norms_K: Tensor, sizes_K: Tensor) -> Tensor:
    """(K,) norms as multiples of sizes; 0 where the size is 0."""
    return torch.where(sizes_K > 0, norms_K / sizes_K, torch.zeros_like(norms_K))


def check_finite(values_K: Tensor, solver: str) -> None:
    if not bool(torch.isfinite(values_K).all()):
        raise GradientError(
            f"{solver} met a product with the curvature that is not finite",
            "expected: finite second derivatives of the loss of each training example",
            "`influence check` names losses and gradients that are not finite",
        )


# ---------------------------------------------------------------- conjugate gradients
def solve_cg(system: LinearSystem, vectors_KP: Tensor) -> Solution:
    """Conjugate gradients, each row on its own. Where rounding parted the recursion's residual from
    the true one, it starts again from the true one.

    Raises NegativeCurvature, and GradientError where it does not converge.
    """
    sizes_K = row_norms(vectors_KP)
    values_KP, residuals_KP = torch.zeros_like(vectors_KP), vectors_KP
    iterations, last = 0, float("inf")
    while True:
        worst = float(relative(row_norms(residuals_KP), sizes_K).max())
        if worst <= system.tolerance:
            return Solution(values_KP, worst, iterations)
        if iterations >= MOST_ITERATIONS["cg"] or worst > REPEATED * last:
            raise not_converged("cg", worst, iterations, system.tolerance)
        last = worst
        steps_KP, passes = descend(system, residuals_KP, sizes_K, iterations)
        values_KP, iterations = values_KP + steps_KP, iterations + passes
        residuals_KP = vectors_KP - system.apply(values_KP)


def descend(
    system: LinearSystem, vectors_KP: Tensor, sizes_K: Tensor, done: int
) -> tuple[Tensor, int]:
    """(K, P) x with |v - (H + damping) x| <= tolerance * size / 2 by the recursion, and the number
    of iterations. A row stops when it is done; the products of the other rows are smaller then.

    `done`: iterations before these.
    """
    values_KP, residuals_KP = torch.zeros_like(vectors_KP), vectors_KP.clone()
    directions_KP = vectors_KP.clone()
    squares_K = residuals_KP.square().sum(1)
    limits_K = 0.5 * system.tolerance * sizes_K
    for iteration in range(MOST_ITERATIONS["cg"] - done):
        rows = (squares_K.sqrt() > limits_K).nonzero().flatten()
        if not len(rows):
            return values_KP, iteration
        u_kP = directions_KP[rows]
        curved_kP = system.apply(u_kP)
        curvatures_k = (u_kP * curved_kP).sum(1)
        check_finite(curvatures_k, "cg")
        if bool((curvatures_k <= 0).any()):
            quotients_k = curvatures_k / u_kP.square().sum(1)
            raise NegativeCurvature(float(quotients_k.min()) - system.damping, system.damping, "cg")
        lengths_k = (squares_K[rows] / curvatures_k)[:, None]
        values_KP[rows] += lengths_k * u_kP
        residuals_kP = residuals_KP[rows] - lengths_k * curved_kP
        after_k = residuals_kP.square().sum(1)
        directions_KP[rows] = residuals_kP + (after_k / squares_K[rows])[:, None] * u_kP
        residuals_KP[rows], squares_K[rows] = residuals_kP, after_k
        system.report(done + iteration + 1, float(relative(squares_K.sqrt(), sizes_K).max()))
    return values_KP, MOST_ITERATIONS["cg"] - done


# ---------------------------------------------------------------- LiSSA
def solve_lissa(system: LinearSystem, vectors_KP: Tensor, scale: float) -> Solution:
    """LiSSA's recursion. `scale`: c, at least half the largest eigenvalue of H + damping.

    Raises NegativeCurvature where it diverges along such a direction, and GradientError where it
    diverges for another reason or does not converge.
    """
    sizes_K = row_norms(vectors_KP)
    values_KP, residuals_KP = torch.zeros_like(vectors_KP), vectors_KP.clone()
    worst, smallest_K = float("inf"), relative(sizes_K, sizes_K)
    for iteration in range(1 + MOST_ITERATIONS["lissa"]):
        norms_K = relative(row_norms(residuals_KP), sizes_K)
        check_finite(norms_K, "lissa")
        worst, smallest_K = float(norms_K.max()), torch.minimum(smallest_K, norms_K)
        if worst <= system.tolerance:
            return Solution(values_KP, worst, iteration)
        diverges_K = norms_K > GROWTH * smallest_K
        if bool(diverges_K.any()):
            raise divergence(system, residuals_KP[int(diverges_K.nonzero()[0])], scale, worst)
        system.report(iteration, worst)
        values_KP = values_KP + residuals_KP / scale  # s / c of the recursion
        residuals_KP = vectors_KP - system.apply(values_KP)
    raise not_converged("lissa", worst, MOST_ITERATIONS["lissa"], system.tolerance)


def divergence(
    system: LinearSystem, residual_P: Tensor, scale: float, worst: float
) -> GradientError:
    """The residual of a recursion that diverges turns to the direction that makes it diverge."""
    size = float(residual_P.square().sum())
    quotient = float(system.apply(residual_P[None])[0] @ residual_P) / size
    if quotient <= 0:
        return NegativeCurvature(quotient - system.damping, system.damping, "lissa")
    return GradientError(
        f"lissa diverged: the relative residual grew to {worst:.3g}",
        f"found: an eigenvalue of the curvature of about {quotient - system.damping:.3g}, with the "
        f"scale {scale:.3g}",
        "--solver cg needs no scale",
    )
