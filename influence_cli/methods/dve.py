"""DVE: data value embedding (Wang et al. 2024, arXiv:2412.09538), trajectory-specific leave-one-out from saved checkpoints.

score(z, q) sums, over the steps t at which z was trained on, -w u_t . g_t(z), with u_t the derivative of the query's loss at the end by
the gradient of step t (adjoint.py). For plain SGD this is the paper's w eta g_t(z)^T prod_k (I - eta H_k) grad m(theta_T, q). Score > 0:
proponent, without z at that step the query's loss had ended higher, by about the score.

Query form: the queries' gradients are carried back, nothing of size p x p. Embedding form: every coordinate of the end is carried back,
which gives the data value embedding of each occurrence; kept on disk it answers any later query (embeddings.py).

N train, Q query, M occurrences, P parts of a score, p numbers of all parameters.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.build import Gradients
from influence_cli.cache.cutting import Ids, blocks
from influence_cli.cache.store import Rows
from influence_cli.errors import OutputError, UsageProblem
from influence_cli.methods import Answer, Question, ValueOptions
from influence_cli.methods.adjoint import Adjoint, total
from influence_cli.methods.backward import Plan, Stability, back, plan, prepare, working_dtype
from influence_cli.methods.embeddings import STATE_BYTES, Embeddings
from influence_cli.methods.ranked import QUERY_BYTES, NewRanking, block_size, mean_query_row, query_rows
from influence_cli.output.ranking import Entry

HELD_BYTES = 1 << 30  # scores held in memory; more lie in a temporary file


@dataclass
class Occurrences:
    """Scores of single occurrences: of `examples` (M,) at `steps` (M,), (M, Q) float64; an example twice in a step is two."""

    steps: np.ndarray
    examples: np.ndarray
    scores: Tensor
    filled: int = 0

    def add(self, step: int, examples: np.ndarray, scores: Tensor) -> None:
        at = slice(self.filled, self.filled + len(examples))
        self.steps[at], self.examples[at], self.scores[at] = step, examples, scores
        self.filled = at.stop

    def by_step(self, at: np.ndarray, query: int) -> dict[int, float]:
        """Step -> score of the occurrences at these positions, in their order; those of one step summed."""
        found: dict[int, float] = {}
        for step, value in zip(self.steps[at].tolist(), self.scores[torch.from_numpy(at.copy()), query].tolist(), strict=True):
            found[step] = found.get(step, 0.0) + value
        return found


@dataclass
class Trace:
    """Scores by step: of all entries of each step together, (T, Q) float64, and of each occurrence of some examples."""

    first: int
    sums: Tensor
    totals: "Totals"
    by: None = None

    def add(self, step: int, part: str, examples: np.ndarray, found: dict[str, Tensor]) -> None:
        self.sums[step - self.first] += total(found).cpu().double().sum(0)
        self.totals.add(step, part, examples, found)

    def series(self, query: int, example: int | None) -> list[tuple[int, float]]:
        """(step, score) of a query, rising: of every step, or of those that an example was trained on."""
        if example is None:
            return list(enumerate(self.sums[:, query].tolist(), start=self.first))
        occurrences = self.totals.occurrences
        assert occurrences is not None
        return list(occurrences.by_step(np.flatnonzero(occurrences.examples == example)[::-1], query).items())


@dataclass
class Totals:
    """Scores of the ranked examples while steps are gone back over: (1 + P, N, Q) float64, the whole scores first, then their parts."""

    ids: Ids
    parts: list[str]
    by: str | None
    queries: int
    folder: Path
    occurrences: Occurrences | None = None
    scores: Tensor = field(init=False)
    place: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.scores = scratch(self.folder, "totals", (1 + len(self.parts), len(self.ids), self.queries))
        last = int(self.ids[-1]) + 1 if len(self.ids) else 0
        self.place = np.full(last, -1)
        self.place[np.asarray(self.ids, np.int64)] = np.arange(len(self.ids))

    def add(self, step: int, part: str, examples: np.ndarray, found: dict[str, Tensor]) -> None:
        """(B, Q) scores of a step's entries, by part of the model or all as one."""
        ranked = examples < len(self.place)
        ranked[ranked] = self.place[examples[ranked]] >= 0
        if not ranked.any():
            return
        keep = torch.from_numpy(ranked)
        at = torch.from_numpy(self.place[examples[ranked]])
        mine = {name: value.cpu()[keep].double() for name, value in found.items()}
        whole = total(mine)
        self.scores[0].index_add_(0, at, whole)
        for name, value in mine.items() if self.by == "layer" else [(part, whole)] if self.by == "checkpoint" else []:
            self.scores[1 + self.parts.index(name)].index_add_(0, at, value)
        if self.occurrences is not None:
            self.occurrences.add(step, examples[ranked], whole)


Sums = TypeVar("Sums", Totals, Trace)


def score(gradients: Gradients, question: Question, new_ranking: NewRanking) -> Iterator[Answer]:
    """Scores of every training example asked for, ranked per query."""

    def totals_of(going: Plan, width: int, folder: Path) -> Totals:
        parts = [str(segment.checkpoint.step) for segment in going.segments] if question.by == "checkpoint" else question.parts
        occurrences = empty_occurrences(going, question.train, width, folder) if question.by == "step" else None
        return Totals(question.train, parts, question.by, width, folder, occurrences)

    for ids, totals in passes(gradients, question, totals_of):
        width = totals.queries
        ranking = new_ranking(width, len(totals.parts))
        scores = totals.scores
        if question.groups:
            sums = torch.zeros(scores.shape[0], len(question.groups.names), width, dtype=torch.float64)
            sums.index_add_(1, torch.from_numpy(question.groups.of[np.asarray(question.train)]), scores)
            ranking.add(np.arange(sums.shape[1]), sums[0].T.numpy(), sums[1:].transpose(1, 2).numpy())
        else:
            for block in blocks(question.train, block_size(width, len(totals.parts))):
                part = scores[:, torch.from_numpy(totals.place[block])].transpose(1, 2).numpy()
                ranking.add(block, part[0], part[1:])
        split = by_step(totals.occurrences, question) if totals.occurrences else None
        yield Answer(None if question.sum_queries else [int(i) for i in ids], ranking, totals.parts, split)


def trace(gradients: Gradients, question: Question) -> Iterator[tuple[Ids, Trace]]:
    """Per pass the queries' ids (one, with --sum-queries) and their scores over training time, of all steps and of `question.train`."""

    def trace_of(going: Plan, width: int, folder: Path) -> Trace:
        occurrences = empty_occurrences(going, question.train, width, folder)
        sums = torch.zeros(len(going.steps), width, dtype=torch.float64)
        return Trace(going.steps.start, sums, Totals(question.train, [], None, width, folder, occurrences))

    yield from passes(gradients, question, trace_of)


def by_step(occurrences: Occurrences, question: Question) -> Callable[[int, Sequence[Entry]], list[list[tuple[str, float]]]]:
    """Of each ranked pair its steps, rising, and their scores; of a group those of its members."""
    owner = occurrences.examples if question.groups is None else question.groups.of[occurrences.examples]
    order = np.lexsort((occurrences.steps, owner))
    owners = owner[order]

    def split(query: int, entries: Sequence[Entry]) -> list[list[tuple[str, float]]]:
        divided = []
        for entry in entries:
            at = slice(*np.searchsorted(owners, [entry.train, entry.train + 1]))
            divided.append([(str(step), value) for step, value in occurrences.by_step(order[at], query).items()])
        return divided

    return split


def passes(gradients: Gradients, question: Question, new: Callable[[Plan, int, Path], Sums]) -> Iterator[tuple[Ids, Sums]]:
    """Per pass over training its query ids, and what `new` (of the plan, queries, a folder to spill to) collected of its scores.

    Raises TrajectoryError, UsageProblem (plan), CacheError (embeddings of something else), GradientError (what is carried back runs away).
    """
    options = question.values or ValueOptions()
    going = plan(gradients.run, question.checkpoints, question.columns, options.at)
    for note in going.notes:
        gradients.talk.note(note)
    gradients.ensure("query", [going.end], list(going.columns), question.queries)
    each = numbers(going) * 8
    most = len(question.queries) if question.sum_queries else max(1, QUERY_BYTES // each)
    cuts = [question.queries[first : first + most] for first in range(0, len(question.queries), most)]
    with tempfile.TemporaryDirectory(prefix="influence-dve-") as name:
        folder = Path(name)
        kept = None
        if embedded(gradients, question, going, options):
            whole = going if options.at is None else plan(gradients.run, question.checkpoints, question.columns)
            kept = Embeddings(options.embeddings or folder / "embeddings", gradients, whole, going.end.step, options)
            kept.ensure()
        else:
            prepare(gradients, going)
        for number, ids in enumerate(cuts, start=1):
            rows = (mean_query_row if question.sum_queries else query_rows)(
                gradients, dataclasses.replace(question, columns=going.columns), going.end, ids
            )
            totals = new(going, len(rows.ids), folder)
            of = f", queries {number} of {len(cuts)}" if len(cuts) > 1 else ""
            with gradients.talk.progress(f"back over training{of}", going.occurrences()) as advance:
                if kept is not None:
                    for step, checkpoint, examples, found in kept.scores(dense(rows, going, gradients.device), advance):
                        totals.add(step, str(checkpoint), examples, {"": found})
                else:
                    carry(gradients, going, rows, options, totals, advance)
            yield ids, totals


def carry(
    gradients: Gradients, going: Plan, rows: Rows, options: ValueOptions, totals: Totals | Trace, advance: Callable[..., None]
) -> None:
    """Query form: the queries' gradients at the end, back over every step."""
    theta = dense(rows, going, gradients.device)
    adjoint = Adjoint(theta, {name: torch.zeros_like(theta[name]) for name in going.with_momentum})
    stability = Stability()
    layers: dict[str, list[str]] = {}
    for name, column in going.columns.items():
        layers.setdefault(column.layer if totals.by == "layer" else "", []).append(name)
    try:
        for step in back(gradients, going, going.segments, adjoint, options.curvature != "none", stability, advance):
            found = {layer: step.effects(options.renormalize, names) for layer, names in layers.items()}
            totals.add(step.number, str(step.checkpoint.step), step.examples, found)
    finally:
        if stability.note():
            gradients.talk.note(str(stability.note()))


def embedded(gradients: Gradients, question: Question, going: Plan, options: ValueOptions) -> bool:
    """Whether the embedding form is taken; says so. Fewer operations: 4 p an occurrence and query, or coordinate of the end."""
    queries, size = 1 if question.sum_queries else len(question.queries), numbers(going)
    if options.form is None and options.embeddings is None:
        cheaper = queries > size and size * size * 8 <= STATE_BYTES
    else:
        cheaper = options.form == "embedding" or options.embeddings is not None
    if cheaper and question.by == "layer":
        raise UsageProblem("--by layer: embeddings are sums over the layers", "--form query splits scores by layer")
    why = (
        f"{queries:,} {'query' if queries == 1 else 'queries'}, {size:,} numbers of parameters"
        if options.embeddings is None
        else f"kept in {options.embeddings}"
    )
    gradients.talk.note(f"dve in {'embedding' if cheaper else 'query'} form ({why}), curvature {options.curvature}")
    return cheaper


def numbers(going: Plan) -> int:
    """What is carried back of one quantity: p, and p again with momentum."""
    return sum(column.numel * (2 if name in going.with_momentum else 1) for name, column in going.columns.items())


def dense(rows: Rows, going: Plan, device: torch.device) -> dict[str, Tensor]:
    """Per parameter (Q, D): the queries' gradients, in memory of their own."""
    wide = working_dtype(rows)
    return {name: rows.forms[name].to(device, wide).dense().values.clone() for name in going.columns}


def empty_occurrences(going: Plan, ids: Ids, queries: int, folder: Path) -> Occurrences:
    ranked = np.zeros(int(ids[-1]) + 1 if len(ids) else 0, dtype=bool)
    ranked[np.asarray(ids, np.int64)] = True
    count = 0
    for step in going.steps:
        examples = going.trajectory.lines[step].examples
        count += int(ranked[examples[examples < len(ranked)]].sum())
    return Occurrences(np.empty(count, np.int64), np.empty(count, np.int64), scratch(folder, "occurrences", (count, queries)))


def scratch(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Zeros, float64: in memory, or in a file where they are many."""
    count = int(torch.Size(shape).numel())
    if count * 8 <= HELD_BYTES:
        return torch.zeros(shape, dtype=torch.float64)
    path = folder / name
    path.unlink(missing_ok=True)
    try:
        with path.open("wb") as file:
            file.truncate(count * 8)
        return torch.from_file(str(path), shared=True, size=count, dtype=torch.float64).view(shape)
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"{count * 8:,} bytes of scores have no place in {folder}: {error}", "TMPDIR names a folder on a larger disk"
        ) from error
