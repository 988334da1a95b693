"""influence inspect: a dry run. It shows the run, its size, the cost, and what the cache has."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from influence_cli.cli import command, options
from influence_cli.cli.method_options import MethodFlags
from influence_cli.cli.torch_import import import_torch
from influence_cli.methods.table import METHODS
from influence_cli.progress import format_bytes, format_duration

if TYPE_CHECKING:
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.cli.opening import Opened
    from influence_cli.diagnostics.cost_estimate import GradientCount, Speed
    from influence_cli.diagnostics.fidelity import Fidelity
    from influence_cli.methods.declaration import Method

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

    It computes gradients for about two seconds to measure time and size, and stores none. It ends
    with an error where disk or memory is too small. With --method it adds the cost of that method.
    With --project or a narrow --store it compares the scores of a sample of pairs with exact ones.
    """
    from influence_cli.cli import specs
    from influence_cli.cli.method_options import method_options, refuse_flags

    specs.check_stdin(queries, train)
    target = specs.target(target_correlation)
    chosen = METHODS[specs.one_of("--method", method, METHODS)]
    own_options = method_options(chosen, method_flags)
    refuse_flags(chosen, {"--project": shared.project is not None})

    import_torch()
    from influence_cli.cli.opening import open_shared
    from influence_cli.extraction.machine import check_fits

    opened = open_shared(shared, trajectory, create=False, searched=target is not None)
    ids = {
        "train": opened.ids("--train", train, "train"),
        "query": opened.ids("--queries", queries, "query"),
    }
    if not chosen.caches_train:
        del ids["train"]
    counts, settings = estimate(opened, ids)
    tables = [
        ("checkpoints", CHECKPOINT_HEADS, checkpoint_cells(opened, lr, lr_weights)),
        ("parameters", PARAMETER_HEADS, parameter_cells(opened)),
        ("gradients", GRADIENT_HEADS, gradient_cells(opened, counts)),
    ]
    if chosen.caches_train:
        tables += fidelity_tables(opened, ids, shared.projection, target)
    settings += method_cost_cells(opened, chosen, own_options, ids["query"], sum_queries)
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
    opened: "Opened", ids: "dict[str, Ids]"
) -> "tuple[dict[str, GradientCount], list[Cells]]":
    """The gradients of each split, and what the missing ones cost."""
    from influence_cli.diagnostics import cost_estimate

    source, columns, folder = opened.gradients, list(opened.columns), opened.folder
    counts = {}
    for split, split_ids in ids.items():
        ids_at = [(checkpoint, split_ids) for checkpoint in opened.checkpoints]
        counts[split] = cost_estimate.count_gradients(source, split, ids_at, columns)
    disk_bytes, _ = total_needs(counts.values())
    speed = cost_estimate.measure_speed(source, opened.checkpoints[0], columns, folder, disk_bytes)
    missing = sum(count.missing for count in counts.values())
    seconds = cost_estimate.estimate_seconds(source, columns, speed, missing, disk_bytes)
    peak = cost_estimate.estimate_peak_bytes(
        source, columns, speed, counts["train"].missing if "train" in counts else 0
    )
    cells = setting_cells(opened, disk_bytes, speed, seconds, peak)
    if "train" in counts:
        cells.append(("score", describe_score(opened, counts["train"].missing)))
    return counts, cells


def describe_score(opened: "Opened", missing: int) -> str:
    """How `score` will get the gradients of training examples, and multiply them."""
    if opened.folder is None:
        return "multiplies each layer's gradients as they are computed, and keeps none"
    if opened.gradients.ranks.count > 1:
        return "the ranks compute and store the missing gradients, then read all of them"
    if missing:
        return "one pass: it computes, stores and multiplies"
    return "reads stored gradients"


def total_needs(counts: "Iterable[GradientCount]") -> tuple[int, int]:
    """Bytes of disk for all splits, and bytes of memory for the largest."""
    pairs = [(count.disk_bytes, count.memory_bytes) for count in counts]
    return sum(disk for disk, _ in pairs), max(memory for _, memory in pairs)


def setting_cells(
    opened: "Opened", disk_bytes: int, speed: "Speed", seconds: float, peak: int
) -> list[Cells]:
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
    milliseconds = f"{speed.gradient_seconds * 1e3:.3g} ms per gradient"
    disk_speed = f", {format_bytes(speed.disk_speed)}/s to disk" if speed.disk_speed else ""
    return [
        ("cache", cache),
        ("precision", f"{precision}, stored as {storage_dtype}"),
        ("device", f"{source.device}, batches of {batch}, units (cache files) of {unit}"),
        ("memory", f"about {format_bytes(peak)} at most while gradients are computed"),
        ("time to compute", f"about {format_duration(seconds)} ({milliseconds}{disk_speed})"),
    ]


def method_cost_cells(
    opened: "Opened", method: "Method", own_options: object, queries: "Ids", sum_queries: bool
) -> list[Cells]:
    """What the method itself costs, if it can tell."""
    from influence_cli.cli.requests import score_request

    if method.estimate_cost is None:
        return []
    request = score_request(opened, method, own_options, range(0), queries, sum_queries=sum_queries)
    return [(method.name, method.estimate_cost(opened.gradients, request))]


def gradient_cells(opened: "Opened", counts: "dict[str, GradientCount]") -> list[Cells]:
    cells = [count_cells(split, count) for split, count in counts.items()]
    return cells + (method_cells(opened) if "train" in counts else [])


def count_cells(name: str, count: "GradientCount") -> Cells:
    cached = count.total - count.missing
    numbers = count.examples, count.total, cached, count.missing
    return (name, *(f"{number:,}" for number in numbers), format_bytes(count.disk_bytes))


def method_cells(opened: "Opened") -> list[Cells]:
    """The gradients of methods that read some rows only, if the run has what they need."""
    from influence_cli.cli.requests import score_request
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
