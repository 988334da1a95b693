"""influence inspect: a dry run. What is there, what it weighs, what it would cost, what would be
reused.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING

from influence_cli.cli import command, options
from influence_cli.cli.method_options import MethodFlags
from influence_cli.methods.table import METHODS
from influence_cli.progress import format_bytes, format_duration

if TYPE_CHECKING:
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.cli.opening import Opened

Row = tuple[str, ...]
SECONDS = 1.5  # how long gradients are taken to measure their time


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
    from influence_cli.cli.opening import open_shared
    from influence_cli.cli.requests import score_request
    from influence_cli.extraction import machine
    from influence_cli.output.tables import to_stdout

    specs.check_stdin(queries, train)
    target = specs.target(target_correlation)
    chosen = METHODS[specs.one_of("--method", method, METHODS)]
    own_options = method_options(chosen, method_flags)
    refuse_flags(chosen, {"--project": shared.project is not None})
    opened = open_shared(shared, trajectory, create=False, searched=target is not None)
    ids = {
        "train": opened.ids("--train", train, "train"),
        "query": opened.ids("--queries", queries, "query"),
    }
    weights = checkpoint_rows(opened, lr, lr_weights)
    if not chosen.caches_train:
        del ids["train"]
    lacking = {
        split: opened.gradients.count_uncached(
            split, [(point, wanted) for point in opened.checkpoints], list(opened.columns)
        )
        for split, wanted in ids.items()
    }
    measured = measure(opened, needs(opened, lacking)[0])
    cells = gradient_rows(opened, ids, lacking)
    kept = fidelity_rows(opened, ids, shared.projection, target) if "train" in ids else []
    stdout = sys.__stdout__ or sys.stdout
    with to_stdout(stdout), redirect_stdout(stdout):
        show("checkpoints", ("step", "file", "size", "weight", "from"), weights)
        show(
            "parameters",
            ("name", "layer", "shape", "way", "form", "bytes per example"),
            parameter_rows(opened),
        )
        show(
            "gradients",
            ("split", "examples", "x checkpoints", "cached", "to compute", "to store"),
            cells,
        )
        if kept:
            heads = (
                "kept",
                "numbers per example",
                "relative error",
                "expected below",
                "Pearson",
                "Spearman",
                "top-10 overlap",
            )
            show("scores of a sample of pairs, against exact ones", heads, kept)
        settings = setting_rows(opened, lacking, measured)
        if chosen.estimate_cost is not None:
            request = score_request(
                opened, chosen, own_options, range(0), ids["query"], sum_queries=sum_queries
            )
            settings.append((method, chosen.estimate_cost(opened.gradients, request)))
        show("", ("setting", "value"), settings)
    if not chosen.caches_train:
        return
    stored, memory = needs(opened, lacking)
    machine.check_fits(opened.folder, stored, memory)


def checkpoint_rows(opened: "Opened", lr: float | None, lr_weights: str | None) -> list[Row]:
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


def parameter_rows(opened: "Opened") -> list[Row]:
    known, ways = (
        opened.gradients.budget.sizes("train", list(opened.columns)).forms,
        opened.gradients.extractor.ways("train", list(opened.columns)),
    )
    return [
        (
            " = ".join(column.names),
            column.layer,
            " x ".join(map(str, column.shape)) or "1",
            ways[name],
            known[name][0],
            format_bytes(known[name][1]),
        )
        for name, column in opened.columns.items()
    ]


def gradient_rows(opened: "Opened", ids: "dict[str, Ids]", lacking: dict[str, int]) -> list[Row]:
    rows: list[Row] = []
    for split, wanted in ids.items():
        total, missing = len(wanted) * len(opened.checkpoints), lacking[split]
        stored, _ = opened.gradients.budget.needs(split, list(opened.columns), missing)
        rows.append(
            (
                split,
                f"{len(wanted):,}",
                f"{total:,}",
                f"{total - missing:,}",
                f"{missing:,}",
                format_bytes(stored),
            )
        )
    return rows + (method_rows(opened) if "train" in ids else [])


def method_rows(opened: "Opened") -> list[Row]:
    """Of methods that read some rows only: what they would read, where the run has what they
    need.
    """
    from influence_cli.cli.requests import score_request
    from influence_cli.errors import InfluenceError

    if opened.run.trajectory_path is None:
        return []
    rows: list[Row] = []
    columns = list(opened.columns)
    for name, method in METHODS.items():
        if method.list_rows is None:
            continue
        request = score_request(opened, method, method.options(), range(0), range(0))
        try:
            ids_at = method.list_rows(opened.gradients, request)
        except InfluenceError as error:
            opened.reporter.note(f"for --method {name}: {error.headline}")
            continue
        total = sum(len(ids) for _, ids in ids_at)
        missing = opened.gradients.count_uncached("train", ids_at, columns)
        stored, _ = opened.gradients.budget.needs("train", columns, missing)
        examples = len({int(index) for _, ids in ids_at for index in ids})
        counts = f"{examples:,}", f"{total:,}", f"{total - missing:,}", f"{missing:,}"
        rows.append((f"train, for {name}", *counts, format_bytes(stored)))
    return rows


def fidelity_rows(
    opened: "Opened", ids: "dict[str, Ids]", kind: str | None, target: float | None
) -> list[Row]:
    """What is kept, and, with a target, projections up to the one that reaches it."""
    from influence_cli.diagnostics.fidelity import chosen_kind, fidelity, search

    columns = list(opened.columns)
    results = fidelity(opened.gradients, opened.checkpoints, columns, ids)
    if target is not None:
        tried = search(
            opened.gradients,
            opened.checkpoints,
            columns,
            ids,
            chosen_kind(opened.gradients, kind),
            target,
        )
        reached = tried[-1].reached >= target
        opened.reporter.note(
            f"{tried[-1].kept} "
            f"{'is the first to reach' if reached else 'is the last tried, and does not reach'} "
            f"{target}"
        )
        results += tried
    exact = opened.gradients.exact().budget.sizes("train", columns).example_bytes(columns)
    if results and results[-1].numbers * opened.gradients.settings.store.itemsize > exact:
        opened.reporter.note(
            f"{results[-1].kept} keeps more than exact gradients in their cheapest form, {exact:,} "
            "bytes an example, do"
        )
    return [
        (
            f.kept,
            f"{f.numbers:,}",
            f"{f.error:.4f}",
            f"{f.allowed:.4f}",
            f"{f.pearson:.4f}",
            f"{f.spearman:.4f}",
            f"{f.overlap:.2f}",
        )
        for f in results
    ]


def setting_rows(opened: "Opened", lacking: dict[str, int], measured: "Measured") -> list[Row]:
    import shutil

    def name(dtype: object) -> str:
        return str(dtype).removeprefix("torch.")

    gradients, folder, columns = opened.gradients, opened.folder, list(opened.columns)
    place, stored = "none: nothing is kept", 0
    if folder is not None:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        stored, _ = needs(opened, lacking)
        place = (
            f"{folder}{'' if folder.exists() else ' (not existing yet)'}, {format_bytes(stored)} "
            f"to store, {format_bytes(shutil.disk_usage(existing).free)} free"
        )
    seconds = sum(lacking.values()) * measured.seconds
    if (
        measured.disk
    ):  # a unit is written while the next is computed; the last has nothing to hide behind
        last = gradients.budget.needs("train", columns, 1)[0] * gradients.budget.unit_size(
            "train", columns, "values"
        )
        seconds = (
            max(seconds + stored * measured.beside, stored / measured.disk)
            + min(stored, last) / measured.disk
        )
    units = (
        gradients.budget.needs("train", columns, lacking.get("train", 0))[1]
        - gradients.budget.needs("train", columns, 0)[1]
    )
    batch, unit = (
        gradients.budget.batch_size("train", columns),
        gradients.budget.unit_size("train", columns, "values"),
    )
    return [
        ("cache", place),
        (
            "precision",
            f"{name(gradients.settings.precision)}, stored as {name(gradients.settings.store)}",
        ),
        ("device", f"{gradients.device}, batches of {batch}, units of {unit}"),
        (
            "memory",
            f"about {format_bytes(measured.peak + units)} at most while gradients are computed",
        ),
        (
            "time to compute",
            f"about {format_duration(seconds)} ({measured.seconds * 1e3:.3g} ms per "
            f"gradient{measured.disk_speed})",
        ),
    ]


def needs(opened: "Opened", lacking: dict[str, int]) -> tuple[int, int]:
    """Bytes on disk, and bytes of memory at work, of what is to be computed."""
    both = [
        opened.gradients.budget.needs(split, list(opened.columns), count)
        for split, count in lacking.items()
    ]
    return sum(stored for stored, _ in both), max(memory for _, memory in both)


@dataclass(frozen=True)
class Measured:
    """Seconds per gradient, peak bytes of this process so far, bytes per second of the cache's disk
    (0: not measured), and by how many seconds a byte that is written slows down what is computed
    beside it.
    """

    seconds: float
    peak: int
    disk: float = 0.0
    beside: float = 0.0

    @property
    def disk_speed(self) -> str:
        return f", {format_bytes(self.disk)}/s to disk" if self.disk else ""


def measure(opened: "Opened", stored: int) -> Measured:
    """Batches of training examples for about two seconds at the first checkpoint, and 128 MB of
    zeros to the cache's disk, in the way in which `stored` bytes are written, beside more of
    them.
    """
    import time
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from influence_cli.cache.store import DIRECT_FROM
    from influence_cli.extraction import machine

    gradients, names, first = opened.gradients, list(opened.columns), opened.checkpoints[0]
    batch, total = gradients.budget.batch_size("train", names), len(opened.run.train)

    def take(going_on: Callable[[], bool]) -> tuple[float, int]:
        started, done = time.perf_counter(), 0
        while not done or going_on():
            ids = np.arange(done % total, min(done % total + batch, total))
            gradients.extractor.rows_at(first, "train", names, ids)
            done += len(ids)
        return time.perf_counter() - started, done

    gradients.extractor.rows_at(
        first, "train", names, np.arange(min(batch, total))
    )  # loads, checks and warms up
    until = time.perf_counter() + SECONDS
    elapsed, done = take(lambda: time.perf_counter() < until)
    seconds, peak = elapsed / done, machine.peak_memory()
    if opened.folder is None:
        return Measured(seconds, peak)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(machine.disk_speed, opened.folder, stored > DIRECT_FROM)
        elapsed, done = take(lambda: not writing.done())
    return Measured(
        seconds, peak, writing.result(), max(0.0, elapsed - done * seconds) / machine.TRIAL_BYTES
    )


def show(title: str, heads: Row, rows: Sequence[Row]) -> None:
    """A plain table, the same in a terminal and in a pipe; numbers to the right."""
    numeric = {
        "step",
        "size",
        "bytes per example",
        "numbers per example",
        "examples",
        "x checkpoints",
        "cached",
        "to compute",
        "to store",
    }
    numeric |= {"relative error", "expected below", "Pearson", "Spearman", "top-10 overlap"}
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in ((title,), heads, *rows) if title else rows:
        cells = [
            cell.rjust(w) if head in numeric else cell.ljust(w)
            for cell, w, head in zip(row, widths, heads, strict=False)
        ]
        print("  ".join(cells).rstrip() if row == (title,) else "  " + "  ".join(cells).rstrip())
    print()
