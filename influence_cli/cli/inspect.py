"""influence inspect: a dry run. It shows the run, its size, the cost, and what the cache has."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from influence_cli.cli import command, options
from influence_cli.cli.method_options import MethodFlags, given_flags
from influence_cli.cli.torch_import import import_torch
from influence_cli.methods.table import METHODS
from influence_cli.progress import format_bytes, format_duration

if TYPE_CHECKING:
    from influence_cli.api.opening import Opened
    from influence_cli.api.score import ScoreArguments
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.diagnostics.cost_estimate import GradientCount, Speed
    from influence_cli.diagnostics.fidelity import Fidelity
    from influence_cli.diagnostics.score_estimate import ScoreJob
    from influence_cli.methods.declaration import Method
    from influence_cli.methods.request import ScoreRequest

Cells = tuple[str, ...]
Titled = tuple[str, Cells, list[Cells]]  # title, heads and rows of a table
CHECKPOINT_HEADS = ("step", "file", "size", "weight", "from")
PARAMETER_HEADS = ("name", "layer", "shape", "capture", "form", "bytes per example")
GRADIENT_HEADS = ("split", "examples", "x checkpoints", "cached", "to compute", "to store")
FIDELITY_HEADS = (
    "stored as", "numbers per example", "relative error", "expected below",
    "Pearson", "Spearman", "top-10 overlap",
)  # fmt: skip
SETTING_HEADS = ("setting", "value")
RIGHT_ALIGNED = {
    "step", "size", "bytes per example", *GRADIENT_HEADS[1:], *FIDELITY_HEADS[1:],
}  # fmt: skip


@command("inspect", example="influence inspect my_run --layers head --store float16")
def inspect(
    shared: options.Shared,
    method_flags: MethodFlags,  # type: ignore[valid-type]  # a class that is made from METHODS
    method: options.Method = options.DEFAULT_METHOD,
    queries: options.Queries = None,
    train: options.Train = None,
    sum_queries: options.SumQueries = False,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    trajectory: options.Trajectory = None,
    target_correlation: options.TargetCorrelation = None,
) -> None:
    """Dry run: show checkpoints, weights, layers, what the cache has, and what the rest would cost.

    It runs a small part of score for about two seconds to measure time and memory, and stores
    nothing. It ends with an error where disk or memory is too small.
    With --project or a narrow --store it compares the scores of a sample of pairs with exact ones.
    """
    from influence_cli.api import specs
    from influence_cli.api.method_options import method_options, refuse_flags
    from influence_cli.api.score import ScoreArguments

    specs.check_stdin(queries, train)
    target = specs.target(target_correlation)
    chosen = METHODS[specs.one_of("--method", method, METHODS)]
    own_options = method_options(chosen, given_flags(method_flags))
    refuse_flags(chosen, {"--project": shared.project is not None})

    import_torch()
    from influence_cli.cli.opening import open_shared
    from influence_cli.extraction.machine import check_fits

    opened = open_shared(shared, trajectory, create=False, searched=target is not None)
    train_ids = opened.ids("--train", train, "train")
    ids = {"train": train_ids, "query": opened.ids("--queries", queries, "query")}
    scores = ScoreArguments(sum_queries, lr=lr, lr_weights=lr_weights)
    request = request_of(opened, chosen, own_options, ids, scores)
    counts, settings = estimate(opened, chosen, request)
    tables = [
        ("checkpoints", CHECKPOINT_HEADS, checkpoint_cells(opened, lr, lr_weights)),
        ("parameters", PARAMETER_HEADS, parameter_cells(opened)),
        ("gradients", GRADIENT_HEADS, gradient_cells(opened, counts)),
    ]
    if chosen.caches_train:
        tables += fidelity_tables(opened, ids, shared.projection, target)
    if chosen.estimate_cost is not None:
        settings.append((chosen.name, chosen.estimate_cost(opened.gradients, request)))
    print_tables([*tables, ("", SETTING_HEADS, settings)])
    if chosen.caches_train:
        check_fits(opened.folder, *total_needs(counts.values()))


def checkpoint_cells(opened: "Opened", lr: float | None, lr_weights: str | None) -> list[Cells]:
    from influence_cli.run.learning_rates import NoLearningRate

    weights = {checkpoint.step: ("unknown", "not found") for checkpoint in opened.checkpoints}
    try:
        weights |= {
            weight.step: (str(weight), weight.source) for weight in opened.weights(lr, lr_weights)
        }
    except NoLearningRate as error:  # without rates a dry run still shows the rest
        opened.reporter.note(str(error).replace("\n  ", "; "))
    return [
        (str(c.step), c.name, format_bytes(c.bytes), *weights[c.step]) for c in opened.checkpoints
    ]


def parameter_cells(opened: "Opened") -> list[Cells]:
    source, columns = opened.gradients, list(opened.columns)
    forms = source.budget.sizes("train", columns).forms
    ways = source.extractor.captures.ways("train", columns)
    return [
        (
            " = ".join(column.names),
            column.layer,
            " x ".join(map(str, column.shape)) or "1",
            ways[name],
            forms[name][0],
            format_bytes(forms[name][1]),
        )
        for name, column in opened.columns.items()
    ]


def estimate(
    opened: "Opened", method: "Method", request: "ScoreRequest"
) -> "tuple[dict[str, GradientCount], list[Cells]]":
    """The gradients of each split, and what the missing ones cost."""
    from influence_cli.diagnostics import cost_estimate, score_estimate

    source, columns, folder = opened.gradients, list(opened.columns), opened.folder
    ids = {"train": request.train, "query": request.queries}
    if not method.caches_train:
        del ids["train"]
    checkpoints = request.checkpoints if method.open_trial else opened.checkpoints
    counts = {
        split: cost_estimate.count_gradients(
            source, split, [(checkpoint, split_ids) for checkpoint in checkpoints], columns
        )
        for split, split_ids in ids.items()
    }
    disk_bytes, _ = total_needs(counts.values())
    cells = setting_cells(opened, disk_bytes)
    if method.open_trial is not None:
        trial = method.open_trial(source, request, folder is not None)
        job = score_estimate.ScoreJob(
            source, request, trial, folder, counts["train"], counts["query"]
        )
        return counts, cells + score_cells(job)
    speed = cost_estimate.measure_speed(source, checkpoints[0], columns, folder, disk_bytes)
    missing = sum(count.missing for count in counts.values())
    seconds = cost_estimate.estimate_seconds(source, columns, speed, missing, disk_bytes)
    peak = cost_estimate.estimate_peak_bytes(
        source, columns, speed, counts["train"].missing if "train" in counts else 0
    )
    return counts, [
        *cells,
        ("memory", f"about {format_bytes(peak)} at most while gradients are computed"),
        ("time to compute", f"about {format_duration(seconds)} ({describe_speed(speed)})"),
    ]


def score_cells(job: "ScoreJob") -> list[Cells]:
    """The path that `score` takes, its memory and its time."""
    from influence_cli.diagnostics import score_estimate

    speed = score_estimate.measure(job)
    seconds = score_estimate.estimate_seconds(job, speed)
    peak = score_estimate.estimate_peak_bytes(job, speed)
    cells: list[Cells] = [
        ("score", score_estimate.describe_path(job)),
        ("memory", f"about {format_bytes(peak)} at most while it runs"),
        ("time to score", f"about {format_duration(seconds)} ({describe_speed(speed)})"),
    ]
    passes = score_estimate.describe_passes(job)
    return [cells[0], ("queries", passes), *cells[1:]] if passes else cells


def describe_speed(speed: "Speed") -> str:
    """What was measured."""
    texts = []
    if speed.gradient_seconds:
        texts.append(f"{speed.gradient_seconds * 1e3:.3g} ms per gradient")
    if speed.read_seconds:
        texts.append(f"{speed.read_seconds * 1e3:.3g} ms per stored gradient")
    if speed.disk_speed:
        texts.append(f"{format_bytes(speed.disk_speed)}/s to disk")
    return ", ".join(texts)


def total_needs(counts: "Iterable[GradientCount]") -> tuple[int, int]:
    """Bytes of disk for all splits, and bytes of memory for the largest."""
    pairs = [(count.disk_bytes, count.memory_bytes) for count in counts]
    return sum(disk for disk, _ in pairs), max(memory for _, memory in pairs)


def setting_cells(opened: "Opened", disk_bytes: int) -> list[Cells]:
    from influence_cli.diagnostics.cost_estimate import free_disk_bytes

    source, columns, folder = opened.gradients, list(opened.columns), opened.folder
    cache = "none: nothing is stored"
    if folder is not None:
        absent = "" if folder.exists() else " (not existing yet)"
        needed, free = format_bytes(disk_bytes), format_bytes(free_disk_bytes(folder))
        cache = f"{folder}{absent}, {needed} to store, {free} free"
    precision = source.settings.precision_name
    storage_dtype = str(source.settings.storage_dtype).removeprefix("torch.")
    batch = source.budget.batch_size("train", columns)
    unit = source.budget.unit_size("train", columns, "values")
    return [
        ("cache", cache),
        ("precision", f"{precision}, stored as {storage_dtype}"),
        ("device", f"{source.device}, batches of {batch}, units (cache files) of {unit}"),
    ]


def request_of(
    opened: "Opened",
    method: "Method",
    own_options: object,
    ids: "dict[str, Ids]",
    scores: "ScoreArguments",
) -> "ScoreRequest":
    """The request that `score` would make; with weights of 1 where there are no learning rates."""
    from influence_cli.api.requests import score_request
    from influence_cli.run.learning_rates import NoLearningRate

    def build(scores: "ScoreArguments") -> "ScoreRequest":
        return score_request(
            opened, method, own_options, ids["train"], ids["query"], scores, last_checkpoint=True
        )

    try:
        return build(scores)
    except NoLearningRate:
        return build(dataclasses.replace(scores, lr=1.0, lr_weights=None))


def gradient_cells(opened: "Opened", counts: "dict[str, GradientCount]") -> list[Cells]:
    cells = [count_cells(split, count) for split, count in counts.items()]
    return cells + (method_cells(opened) if "train" in counts else [])


def count_cells(name: str, count: "GradientCount") -> Cells:
    cached = count.total - count.missing
    numbers = count.examples, count.total, cached, count.missing
    return (name, *(f"{number:,}" for number in numbers), format_bytes(count.disk_bytes))


def method_cells(opened: "Opened") -> list[Cells]:
    """The gradients of methods that read some rows only, if the run has what they need."""
    from influence_cli.api.requests import score_request
    from influence_cli.diagnostics.cost_estimate import count_gradients
    from influence_cli.errors import InfluenceError

    if opened.run.trajectory_path is None:
        return []
    cells: list[Cells] = []
    for name, method in METHODS.items():
        if method.list_rows is None:
            continue
        request = score_request(opened, method, method.options(), range(0), range(0))
        try:
            ids_at = method.list_rows(opened.gradients, request)
        except InfluenceError as error:
            opened.reporter.note(f"for --method {name}: {error.headline}")
            continue
        count = count_gradients(opened.gradients, "train", ids_at, list(opened.columns))
        cells.append(count_cells(f"train, for {name}", count))
    return cells


def fidelity_tables(
    opened: "Opened", ids: "dict[str, Ids]", kind: str | None, target: float | None
) -> list[Titled]:
    """The kept gradients; with a target also projections up to the first that reaches it.

    No table if the gradients are exact and there is no target.
    """
    from influence_cli.diagnostics import fidelity

    source, columns = opened.gradients, list(opened.columns)
    results = fidelity.measure_fidelity(source, opened.checkpoints, columns, ids)
    if target is not None:
        tried = fidelity.search_projection(source, opened.checkpoints, columns, ids, kind, target)
        last = tried[-1]
        reached = "is the smallest tried that reaches"
        missed = "is the largest tried and does not reach"
        opened.reporter.note(
            f"{last.kept} {reached if last.reached >= target else missed} {target}"
        )
        results += tried
    exact_bytes = source.exact().budget.sizes("train", columns).example_bytes(columns)
    if results and results[-1].numbers * source.settings.storage_dtype.itemsize > exact_bytes:
        opened.reporter.note(
            f"{results[-1].kept} stores more than exact gradients, which take {exact_bytes:,} "
            "bytes per example"
        )
    cells = [fidelity_cells(result) for result in results]
    title = "scores of a sample of pairs, against exact ones"
    return [(title, FIDELITY_HEADS, cells)] if cells else []


def fidelity_cells(result: "Fidelity") -> Cells:
    figures = result.error, result.allowed, result.pearson, result.spearman
    numbers = (f"{figure:.4f}" for figure in figures)
    return (result.kept, f"{result.numbers:,}", *numbers, f"{result.overlap:.2f}")


def print_tables(tables: Sequence[Titled]) -> None:
    from influence_cli.output.tables import to_stdout

    stdout = sys.__stdout__ or sys.stdout
    with to_stdout(stdout), redirect_stdout(stdout):
        for title, heads, rows in tables:
            print_table(title, heads, rows)


def print_table(title: str, heads: Cells, rows: Sequence[Cells]) -> None:
    """A plain table, the same in a terminal and in a pipe. No title: no heads."""
    from influence_cli.output.visible import escape_controls

    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    if title:
        print(escape_controls(title))
    for row in (heads, *rows) if title else rows:
        cells = [
            cell.rjust(width) if head in RIGHT_ALIGNED else cell.ljust(width)
            for cell, width, head in zip(row, widths, heads, strict=True)
        ]
        print(escape_controls("  " + "  ".join(cells).rstrip()))
    print()
