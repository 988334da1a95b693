"""Computes data value embeddings: a reverse pass of every number of the state, part by part.

Letters: B entries of a step, S numbers of the state.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from influence_cli.errors import UsageProblem
from influence_cli.extraction.machine import available_memory, check_fits
from influence_cli.methods.reverse.drift import fill_cache
from influence_cli.methods.reverse.embedding_identity import check_identity
from influence_cli.methods.reverse.embedding_store import EmbeddingStore, Part
from influence_cli.methods.reverse.fisher_steps import CachedSteps, FisherStepBuilder
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint
from influence_cli.methods.reverse.stability import Stability, state_norms
from influence_cli.methods.reverse.steps import PassSettings, StepEffects, propagate
from influence_cli.progress import Advance
from influence_cli.storage.atomic import remove_stale_files, report_disk_errors

ROWS_BYTES = 64 << 20  # of a file of rows


def build_embeddings(store: EmbeddingStore) -> None:
    """Compute the parts that the store lacks.

    Raises CacheError (a folder with other content, a full disk), UsageProblem (too little memory).
    """
    with report_disk_errors(store.folder):
        store.folder.mkdir(parents=True, exist_ok=True)
    check_identity(store)
    remove_stale_files(store.folder)  # it is ours
    missing = [part for part in store.parts if not store.is_complete(part)]
    if not missing:
        return
    source, plan = store.source, store.plan
    occurrences = sum(plan.count_occurrences(range(*part)) for part in missing)
    workers = count_workers(store, missing, occurrences)
    fill_cache(source, plan)
    label = f" ({workers} parts in parallel)" if workers > 1 else ""
    stability = Stability()
    try:
        with source.reporter.progress(f"data value embeddings{label}", occurrences) as advance:
            build_in_parallel(store, missing, workers, stability, advance)
    finally:
        if note := stability.note():
            source.reporter.note(note)


def count_workers(store: EmbeddingStore, missing: list[Part], occurrences: int) -> int:
    """How many parts to compute in parallel: on a CPU one per thread, if memory allows.

    Raises UsageProblem or CacheError where memory or the disk is too small for one part.
    """
    size, item_bytes = store.state_size, store.dtype.itemsize
    map_bytes = size * size * item_bytes
    working_bytes = 2 * map_bytes
    fitting = (available_memory() or working_bytes) // working_bytes
    if not fitting:
        raise UsageProblem(
            f"the embedding form propagates {size:,} x {size:,} numbers, which do not fit into "
            f"memory ({working_bytes:,} bytes)",
            "--form query (without --embeddings) propagates the queries' gradients only; --layers "
            "GLOB selects fewer parameters",
        )
    disk_bytes = occurrences * size * item_bytes + len(missing) * map_bytes
    check_fits(store.folder, disk_bytes, working_bytes)
    if store.source.cache is None or store.source.device.type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), len(missing), fitting))


def build_in_parallel(
    store: EmbeddingStore, parts: list[Part], workers: int, stability: Stability, advance: Advance
) -> None:
    """Build the parts in threads, last part first. An error or Ctrl-C stops all of them."""
    lock, stop = threading.Lock(), threading.Event()

    def advance_safely(examples: int, where: str = "") -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        with lock:
            advance(examples, where)

    with one_torch_thread_each(workers):
        pool = ThreadPoolExecutor(workers)
        try:
            jobs = [
                pool.submit(build_part, store, part, stability, advance_safely)
                for part in reversed(parts)
            ]
            for job in jobs:
                job.result()
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def one_torch_thread_each(workers: int) -> Iterator[None]:
    """Let several workers use one thread of torch each."""
    threads = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build_part(
    store: EmbeddingStore, part: Part, stability: Stability, advance: Callable[[int, str], None]
) -> None:
    """Propagate the identity from the part's end to its start, and write the effects and the map.

    The last part ends with training, where nothing depends on a momentum buffer.
    """
    store.make_part(part)
    adjoint = identity_adjoint(store, store.quantities(part))
    settings = PassSettings(len(next(iter(adjoint.theta.values()))), store.dtype)
    curved = store.options.curvature != "none"
    builder = FisherStepBuilder(store.source, store.plan, curved, stability)
    steps = CachedSteps(builder).steps_between(*part, settings)
    norms, renormalize = state_norms(adjoint), store.options.renormalize
    unsaved: list[StepEffects] = []
    files: list[Part] = []
    stop, size = part[1], 0
    for effects in propagate(steps, adjoint, norms, renormalize, layers={}):
        advance(len(effects.examples), f"step {effects.step}")
        unsaved.append(effects)
        size += effects.values[""].nbytes
        if size >= ROWS_BYTES:
            files.append(store.write_rows(part, stop, unsaved))
            unsaved, stop, size = [], files[-1][0], 0
    if unsaved:
        files.append(store.write_rows(part, stop, unsaved))
    states = [*adjoint.theta.values(), *(adjoint.moment[name] for name in store.with_momentum)]
    store.write_map(part, torch.cat([value.cpu() for value in states], dim=1), files)


def identity_adjoint(store: EmbeddingStore, quantities: int) -> Adjoint:
    """The adjoint whose quantities are the numbers of the state itself: the identity, in blocks.

    `quantities`: only the first numbers of the state.
    """
    widths = list(store.widths.values())
    count = len(store.plan.columns)
    first, blocks = 0, []
    for width in widths:
        block = torch.zeros(quantities, width, dtype=store.dtype, device=store.source.device)
        inside = max(0, min(width, quantities - first))
        block[first : first + inside].fill_diagonal_(1)
        blocks.append(block)
        first += width
    return Adjoint(
        dict(zip(store.plan.columns, blocks[:count], strict=True)),
        dict(zip(store.with_momentum, blocks[count:], strict=True)),
    )
