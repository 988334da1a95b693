"""Multiplies query gradients with (H + damping)^{-1}, H the exact curvature, by a solver.

With a cache each block of solutions is kept, so that a killed command resumes at its last block,
and ranks divide the blocks.

Letters: K queries of a block, P numbers of all parameters together.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.errors import GradientError, counted
from influence_cli.gradients.forms import Dense, Form
from influence_cli.preconditioners.linear_solvers import (
    LinearSystem,
    Report,
    Solution,
    solve_cg,
    solve_lissa,
)
from influence_cli.preconditioners.passes import folder_of, read_sums, write_sums
from influence_cli.preconditioners.spectrum import Spectrum, estimate_spectrum
from influence_cli.preconditioners.training_curvature import TrainingCurvature
from influence_cli.progress import Advance

# damping auto: the condition number of H + damping is about 1 / LARGEST_SHARE at most
LARGEST_SHARE = 0.01  # of the largest eigenvalue
NEGATIVE_SHARE = 2.0  # of the size of the most negative one
# Of the relative residual. Rounding of products limits it to about their precision times the
# condition number of H + damping: this is its square root.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 3e-4}


@dataclass(frozen=True)
class ExactInverse:
    """(H + damping)^{-1} of all parameters together. `scale`: c of LiSSA; None for cg."""

    curvature: TrainingCurvature
    damping: float
    scale: float | None

    @classmethod
    def of(
        cls, curvature: TrainingCurvature, solver: str, damping: float | None, seed: int
    ) -> "ExactInverse":
        """`damping`: None chooses a hundredth of the largest eigenvalue, and at least twice the
        size of the most negative one. `seed`: of the random vectors that estimate eigenvalues.

        Raises GradientError where the curvature is 0 and no damping is given.
        """
        if damping is not None and solver == "cg":
            return cls(curvature, damping, None)
        spectrum = shared_spectrum(curvature, seed)
        if damping is None:
            damping = choose_damping(curvature, spectrum)
        scale = max(spectrum.largest, 0.0) + damping
        if solver != "lissa":
            return cls(curvature, damping, None)
        curvature.source.reporter.note(
            f"lissa: s <- v + (I - (H + {damping:.6g} I) / {scale:.6g}) s converges to "
            f"{scale:.6g} (H + {damping:.6g} I)^-1 v; the scale is the largest eigenvalue of "
            "Lanczos, plus the damping"
        )
        return cls(curvature, damping, scale)

    @property
    def solver(self) -> str:
        return "cg" if self.scale is None else "lissa"

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.curvature.source.settings.precision]

    def apply(self, rows: GradientRows) -> GradientRows:
        """The same rows with solutions for gradients, and the norms of these.

        Raises GradientError: negative curvature, or a solver that does not converge.
        """
        source, size = self.curvature.source, self.curvature.rows_at_once
        ranks = source.ranks
        blocks = list(rows.parts(size))
        if ranks.count > 1 and source.cache is not None:
            for block in blocks[ranks.rank :: ranks.count]:
                self.solve(block, len(rows.ids))
            ranks.wait()  # all blocks are in the cache
        solutions = [self.solve(block, len(rows.ids)) for block in blocks]
        self.curvature.release()
        source.reporter.note(self.describe(len(rows.ids), solutions))
        values_QP = torch.cat([solution.values for solution in solutions])
        forms: dict[str, Form] = {}
        for name, at in self.curvature.places.items():
            form = rows.forms[name]
            values_QD = values_QP[:, at].to(form.device, form.dtype)
            forms[name] = Dense(self.curvature.columns[name].shape, values_QD)
        sqnorms = {name: form.sqnorm() for name, form in forms.items()}
        return dataclasses.replace(rows, forms=forms, sqnorms=sqnorms)

    def describe(self, queries: int, solutions: list[Solution]) -> str:
        most = max(solution.iterations for solution in solutions)
        worst = max(solution.residual for solution in solutions)
        return (
            f"{self.solver} solved {counted(queries, 'query', 'queries')} with --damping "
            f"{self.damping:.6g}: {counted(most, 'iteration')}, relative residual {worst:.2g} "
            f"(limit {self.tolerance:.2g})"
        )

    def solve(self, rows: GradientRows, queries: int) -> Solution:
        """The solutions of a block, from the cache where it has them. `queries`: of all blocks."""
        vectors_KP = self.curvature.join(rows.forms)
        path = self.path(vectors_KP)
        if path is not None and path.is_file():
            tensors = read_sums(path)
            residual, iterations = tensors["report"].tolist()
            return Solution(tensors["values"], residual, int(iterations))
        label = f"{self.solver}, {counted(len(rows.ids), 'query', 'queries')} of {queries}"
        with self.curvature.source.reporter.progress(label, 100) as advance:
            report = percent_report(advance, self.tolerance)
            system = LinearSystem(self.curvature.product, self.damping, self.tolerance, report)
            solution = (
                solve_cg(system, vectors_KP)
                if self.scale is None
                else solve_lissa(system, vectors_KP, self.scale)
            )
        solution = dataclasses.replace(solution, values=self.rounded(solution.values))
        if path is not None:
            counts = torch.tensor(
                [solution.residual, float(solution.iterations)], dtype=torch.float64
            )
            write_sums(path, {"values": solution.values, "report": counts})
        return solution

    def rounded(self, values_KP: Tensor) -> Tensor:
        """On the CPU, in the precision of the run."""
        return values_KP.to("cpu", self.curvature.source.settings.precision).contiguous()

    def path(self, vectors_KP: Tensor) -> Path | None:
        """Of the solutions of these right-hand sides; None without a cache."""
        key = (self.solver, self.damping, self.tolerance)
        return stored_path(self.curvature, "solved", (*key, digest(vectors_KP)))


def percent_report(advance: Advance, tolerance: float) -> Report:
    """A Report that advances by the share of the digits of the tolerance, in percent."""
    done = 0

    def report(iterations: int, residual: float) -> None:
        nonlocal done
        share = math.log(min(1.0, max(residual, tolerance))) / math.log(tolerance)
        percent = max(done, 1 + int(98 * share))
        advance(percent - done, f"iteration {iterations:,}, relative residual {residual:.2g}")
        done = percent

    return report


# ---------------------------------------------------------------- eigenvalues
def shared_spectrum(curvature: TrainingCurvature, seed: int) -> Spectrum:
    """The estimate of rank 0, from the cache where it has one."""
    ranks = curvature.source.ranks
    numbers = []
    if ranks.rank == 0:
        numbers = list(dataclasses.astuple(stored_spectrum(curvature, seed)))
    return Spectrum(*ranks.share(numbers))


def stored_spectrum(curvature: TrainingCurvature, seed: int) -> Spectrum:
    path = stored_path(curvature, "spectrum", (seed,))
    if path is not None and path.is_file():
        return Spectrum(*read_sums(path)["eigenvalues"].tolist())
    with curvature.source.reporter.progress("largest and smallest eigenvalues", 1) as advance:
        spectrum = estimate_spectrum(
            curvature.product, curvature.size, seed, curvature.rows_at_once, curvature.place
        )
        advance(1)
    if path is not None:
        numbers = torch.tensor(dataclasses.astuple(spectrum), dtype=torch.float64)
        write_sums(path, {"eigenvalues": numbers})
    return spectrum


def choose_damping(curvature: TrainingCurvature, spectrum: Spectrum) -> float:
    share, least = LARGEST_SHARE * spectrum.largest, -NEGATIVE_SHARE * spectrum.smallest
    damping = max(share, least)
    if damping <= 0:
        raise GradientError(
            "the curvature is 0, so --damping auto has nothing to measure",
            "--damping X gives a number to add to it",
        )
    reason = "1 % of the largest" if share >= least else "twice the size of the most negative"
    curvature.source.reporter.note(
        f"--damping auto: {damping:.6g}, {reason} eigenvalue (they are about "
        f"{spectrum.smallest:.3g} to {spectrum.largest:.3g})"
    )
    return damping


# ---------------------------------------------------------------- files
def stored_path(curvature: TrainingCurvature, stage: str, key: tuple[object, ...]) -> Path | None:
    folder = folder_of(curvature.source, curvature.checkpoint, (curvature.curvature,))
    if folder is None:
        return None
    text = repr((tuple(curvature.places), *key))
    return folder / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def digest(values_KP: Tensor) -> str:
    content = hashlib.sha256()
    for row_P in values_KP.cpu():
        content.update(row_P.numpy().tobytes())
    return content.hexdigest()
