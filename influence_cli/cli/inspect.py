"""influence inspect: a dry run. What is there, what it weighs, what it would cost, what would be reused."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from influence_cli.cli import command, options

if TYPE_CHECKING:
    from influence_cli.cache.build import Ids
    from influence_cli.cli.opening import Opened

Row = tuple[str, ...]


@command("inspect", example="influence inspect my_run --layers head --store float16")
def inspect(
    shared: options.Shared,
    queries: options.Queries = None,
    train: options.Train = None,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    trajectory: options.Trajectory = None,
) -> None:
    """A dry run: checkpoints and their weights, layers and their sizes, what is cached, what the rest would cost.

    Takes the gradients of one small batch to measure, and writes none.
    """
    from influence_cli.cli import specs
    from influence_cli.cli.opening import open_shared
    from influence_cli.output.tables import to_stdout

    specs.check_stdin(queries, train)
    opened = open_shared(shared, trajectory, create=False)
    ids = {"train": opened.ids("--train", train, "train"), "query": opened.ids("--queries", queries, "query")}
    weights = checkpoint_rows(opened, lr, lr_weights)
    seconds, forms = measured(opened)
    lacking = {split: opened.gradients.lacking(split, opened.checkpoints, list(opened.columns), wanted) for split, wanted in ids.items()}
    cells = gradient_rows(ids, lacking, len(opened.checkpoints), sum(each for _, each in forms.values()))
    stdout = sys.__stdout__ or sys.stdout
    with to_stdout(stdout), redirect_stdout(stdout):
        show("checkpoints", ("step", "file", "size", "weight", "from"), weights)
        show("parameters", ("name", "layer", "shape", "form", "bytes per example"), parameter_rows(opened, forms))
        show("gradients", ("split", "examples", "x checkpoints", "cached", "to compute", "to store"), cells)
        show("", ("setting", "value"), setting_rows(opened, sum(lacking.values()), seconds))


def checkpoint_rows(opened: "Opened", lr: float | None, lr_weights: str | None) -> list[Row]:
    from influence_cli.run.learning_rates import NoLearningRate

    weights = {checkpoint.step: ("unknown", "not found") for checkpoint in opened.checkpoints}
    try:
        weights |= {weight.step: (str(weight), weight.source) for weight in opened.weights(lr, lr_weights)}
    except NoLearningRate as error:  # without rates a dry run still shows the rest
        opened.talk.note(str(error).replace("\n  ", "; "))
    return [(str(c.step), c.name, size(c.bytes), *weights[c.step]) for c in opened.checkpoints]


def parameter_rows(opened: "Opened", forms: dict[str, tuple[str, int]]) -> list[Row]:
    return [
        (" = ".join(column.names), column.layer, " x ".join(map(str, column.shape)) or "1", forms[name][0], size(forms[name][1]))
        for name, column in opened.columns.items()
    ]


def gradient_rows(ids: "dict[str, Ids]", lacking: dict[str, int], checkpoints: int, bytes_each: int) -> list[Row]:
    rows: list[Row] = []
    for split, wanted in ids.items():
        total, missing = len(wanted) * checkpoints, lacking[split]
        rows.append((split, f"{len(wanted):,}", f"{total:,}", f"{total - missing:,}", f"{missing:,}", size(missing * bytes_each)))
    return rows


def setting_rows(opened: "Opened", todo: int, seconds: float) -> list[Row]:
    import shutil

    def name(dtype: object) -> str:
        return str(dtype).removeprefix("torch.")

    gradients, folder = opened.gradients, opened.folder
    place = "none: nothing is kept"
    if folder is not None:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        place = f"{folder}{'' if folder.exists() else ' (not there yet)'}, {size(shutil.disk_usage(there).free)} free"
    return [
        ("cache", place),
        ("precision", f"{name(gradients.settings.precision)}, stored as {name(gradients.settings.store)}"),
        ("device", f"{gradients.device}, batches of {gradients.batch_size('train', list(opened.columns))}"),
        ("time to compute", f"about {duration(todo * seconds)} ({seconds * 1e3:.3g} ms per gradient, measured on one batch)"),
    ]


def measured(opened: "Opened") -> tuple[float, dict[str, tuple[str, int]]]:
    """Seconds per example and, per column, form and bytes per example as stored: of one batch at the first checkpoint."""
    import time

    import numpy as np

    gradients, names = opened.gradients, list(opened.columns)
    batch = np.arange(min(gradients.batch_size("train", names), len(opened.run.train)))
    first = opened.checkpoints[0]
    gradients.capture("train", first, names, batch)  # loads, checks and warms up
    started = time.perf_counter()
    rows = gradients.capture("train", first, names, batch)
    seconds = (time.perf_counter() - started) / len(batch)
    wide = gradients.settings.store.itemsize / gradients.settings.precision.itemsize
    return seconds, {name: (form.kind, round(form.nbytes / len(batch) * wide)) for name, form in rows.forms.items()}


def show(title: str, heads: Row, rows: Sequence[Row]) -> None:
    """A plain table, the same in a terminal and in a pipe; numbers to the right."""
    numeric = {"step", "size", "bytes per example", "examples", "x checkpoints", "cached", "to compute", "to store"}
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in ((title,), heads, *rows) if title else rows:
        cells = [cell.rjust(w) if head in numeric else cell.ljust(w) for cell, w, head in zip(row, widths, heads, strict=False)]
        print("  ".join(cells).rstrip() if row == (title,) else "  " + "  ".join(cells).rstrip())
    print()


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
