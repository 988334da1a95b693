"""Estimates the extreme eigenvalues of a matrix from products with random vectors.

Lanczos from a random vector gives a tridiagonal matrix, whose eigenvalues come close to the largest
and the smallest eigenvalue of H, from inside.

Letters: K random vectors, P numbers of all parameters together, S Lanczos steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.preconditioners.linear_solvers import Product, check_finite, row_norms

VECTORS = 4  # random vectors: the most extreme result counts
STEPS = 30  # of Lanczos
EXHAUSTED = 1e-10  # of the largest entry: the vectors span all that H reaches from q


@dataclass(frozen=True)
class Spectrum:
    """Estimated eigenvalues of H, not outside the true ones."""

    largest: float
    smallest: float


def estimate_spectrum(
    product: Product, size: int, seed: int, vectors: int, device: torch.device
) -> Spectrum:
    """`size`: P. `vectors`: K, at most VECTORS. Raises GradientError for products not finite."""
    generator = torch.Generator().manual_seed(seed)
    signs_KP = torch.randint(0, 2, (min(vectors, VECTORS), size), generator=generator)
    q_KP = ((2 * signs_KP - 1).double() / size**0.5).to(device)
    diagonal_KS, beside_KS = tridiagonal(product, q_KP, min(STEPS, size))
    matrices_KSS = torch.diag_embed(diagonal_KS)
    matrices_KSS += torch.diag_embed(beside_KS, 1) + torch.diag_embed(beside_KS, -1)
    values_KS = torch.linalg.eigvalsh(matrices_KSS)
    return Spectrum(float(values_KS.max()), float(values_KS.min()))


def tridiagonal(product: Product, q_KP: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lanczos: the diagonals (K, S) and the entries beside them (K, S - 1), on the CPU. It stops
    before `steps` where one of the vectors is exhausted.
    """
    diagonal, beside = [], []
    before_KP, beta_K = torch.zeros_like(q_KP), torch.zeros_like(q_KP[:, 0])
    while True:
        w_KP = product(q_KP) - beta_K[:, None] * before_KP
        alpha_K = (w_KP * q_KP).sum(1)
        check_finite(alpha_K, "Lanczos")
        diagonal.append(alpha_K.cpu())
        w_KP = w_KP - alpha_K[:, None] * q_KP
        beta_K = row_norms(w_KP)
        scale_K = torch.stack(diagonal).abs().amax(0).to(beta_K.device)
        if len(diagonal) == steps or bool((beta_K <= EXHAUSTED * scale_K).any()):
            break
        beside.append(beta_K.cpu())
        before_KP, q_KP = q_KP, w_KP / beta_K[:, None]
    off_diagonal = torch.stack(beside, 1) if beside else torch.zeros(len(q_KP), 0).double()
    return torch.stack(diagonal, 1), off_diagonal
