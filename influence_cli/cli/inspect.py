"""influence inspect: a dry run. What is there, what it weighs, what it would cost, what would be reused."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from influence_cli.cli import app, options, reporting

if TYPE_CHECKING:
    from influence_cli.cli.opening import Opened


@app.command(epilog="Example: influence inspect my_run --layers head --store float16")
@reporting
def inspect(
    run: options.Run = Path("."),
    queries: options.Queries = None,
    train: options.Train = None,
    steps: options.Steps = None,
    layers: options.Layers = None,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    precision: options.Precision = None,
    store: options.StoreAs = None,
    device: options.Device = "auto",
    batch_size: options.BatchSize = "auto",
    definition: options.Definition = None,
    checkpoints: options.Checkpoints = None,
    trajectory: options.Trajectory = None,
    cache: options.Cache = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """A dry run: checkpoints and their weights, layers and their sizes, what is cached, what the rest would cost.

    Takes the gradients of one small batch to measure, and writes none.
    """
    import shutil

    from rich.console import Console

    from influence_cli.cli.opening import Shared, open_shared
    from influence_cli.errors import UsageProblem

    stdout = sys.__stdout__ or sys.stdout
    console = Console(file=stdout, highlight=False, soft_wrap=True)
    opened = open_shared(
        Shared(run, definition, checkpoints, trajectory, cache, steps, layers, device, batch_size, precision, store, quiet), create=False
    )
    ids = {"train": opened.ids("--train", train, "train"), "query": opened.ids("--queries", queries, "query")}
    try:
        weights = {weight.step: (str(weight), weight.source) for weight in opened.weights(lr, lr_weights)}
    except UsageProblem as error:  # no rates: a dry run still shows the rest
        weights, problem = {}, error
    else:
        problem = None
    gradients = opened.gradients
    rows = [
        (str(c.step), c.name, size(c.bytes), *weights.get(c.step, ("unknown", "not found: --lr X or --lr-weights none")))
        for c in opened.checkpoints
    ]
    show(console, "checkpoints", ("step", "file", "size", "weight", "from"), rows)
    if problem:
        opened.talk.note(str(problem).replace("\n  ", "; "))

    seconds, forms = measured(opened)
    names = list(opened.columns)
    bytes_each = sum(each for _, each in forms.values())
    rows = [
        (
            name + "".join(f" = {other}" for other in column.names[1:]),
            column.layer,
            shape(column.shape),
            forms[name][0],
            size(forms[name][1]),
        )
        for name, column in opened.columns.items()
    ]
    show(console, "\nparameters", ("name", "layer", "shape", "form", "bytes per example"), rows)

    rows, todo = [], 0
    for split, wanted in ids.items():
        total = len(wanted) * len(opened.checkpoints)
        lacking = total
        if gradients.store is not None:
            lacking = sum(len(job.ids) for job in gradients.missing(split, opened.checkpoints, names, wanted, "values"))
        todo += lacking
        rows.append((split, f"{len(wanted):,}", f"{total:,}", f"{total - lacking:,}", f"{lacking:,}", size(lacking * bytes_each)))
    show(console, "\ngradients", ("split", "examples", "x checkpoints", "cached", "to compute", "to store"), rows)
    where = gradients.store.folder if gradients.store else None
    free = shutil.disk_usage(opened.run.folder).free
    kept = f"in {where}, {size(free)} free" if where else "nothing is kept" if cache == "none" else f"no cache yet, {size(free)} free"
    console.print(
        f"\n{gradients.settings.key}; {kept}; device {gradients.device}, batches of {gradients.batch_size(names)}; "
        f"about {duration(todo * seconds)} for what is to compute ({seconds * 1e3:.3g} ms each, measured on one batch)"
    )


def measured(opened: "Opened") -> tuple[float, dict[str, tuple[str, int]]]:
    """Seconds per example and, per column, form and bytes per example as stored: of one batch at the first checkpoint."""
    import time

    import numpy as np

    gradients, names = opened.gradients, list(opened.columns)
    batch = np.arange(min(gradients.batch_size(names), len(opened.run.train)))
    first = opened.checkpoints[0]
    gradients.capture("train", first, names, batch[:2])  # loads, checks and warms up
    started = time.perf_counter()
    rows = gradients.capture("train", first, names, batch)
    seconds = (time.perf_counter() - started) / len(batch)
    wide = gradients.settings.store.itemsize / gradients.settings.precision.itemsize
    return seconds, {name: (form.kind, round(form.nbytes / len(batch) * wide)) for name, form in rows.forms.items()}


def show(console, title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A plain table, the same in a terminal and in a pipe; numbers to the right."""
    numeric = {"step", "size", "bytes per example", "examples", "x checkpoints", "cached", "to compute", "to store"}
    table = [heads, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    console.print(title, style="bold", markup=False)
    for row in table:
        cells = [cell.rjust(w) if head in numeric else cell.ljust(w) for cell, w, head in zip(row, widths, heads, strict=True)]
        console.print("  " + "  ".join(cells).rstrip(), style="dim" if row is heads else "", markup=False)


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def shape(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers)) or "1"
