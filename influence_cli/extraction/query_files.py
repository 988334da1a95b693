"""Gradients of queries in temporary files, where they do not fit into memory."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.unit_file import Unit, encode_unit, fetch_unit
from influence_cli.cache.verification import Verification
from influence_cli.errors import OutputError
from influence_cli.extraction.read_through import LoadRows, one_ahead
from influence_cli.storage.safetensors_io import stream_tensors
from influence_cli.storage.scratch import ScratchFolder

REMEDIES = (
    "name a folder on a larger disk: TMPDIR=FOLDER",
    "--queries selects fewer; --layers GLOB and --project K make gradients smaller; with a cache, "
    "no temporary folder is needed",
)


@contextmanager
def open_query_files(
    columns: Sequence[str], checkpoints: int, size: int, processes: int
) -> Iterator["QueryFiles"]:
    """New files, which are removed when the block ends. The next command removes those of a killed
    one.

    `size`: bytes that the files will take. `processes`: on this machine, each with its own files.
    Raises OutputError: no folder, no room.
    """
    parent = Path(tempfile.gettempdir())
    try:
        scratch = ScratchFolder(parent)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise OutputError(
            f"the gradients of the queries need a temporary folder: {error}",
            "name a folder that can be written: TMPDIR=FOLDER",
        ) from error
    with scratch as folder:
        if size * processes > free:
            raise OutputError(
                f"the gradients of the queries do not fit on the disk of {parent}",
                f"needed: {size * processes:,} bytes; free: {free:,} bytes",
                *REMEDIES,
            )
        yield QueryFiles(folder, tuple(columns), checkpoints)


class QueryFiles:
    """One file for each checkpoint and pass of queries, both by their numbers, with the gradients
    as they were computed.
    """

    def __init__(self, folder: Path, columns: tuple[str, ...], checkpoints: int) -> None:
        self.folder, self.columns, self.checkpoints = folder, columns, checkpoints
        self._verification = Verification()
        self._units: dict[tuple[int, int], Unit] = {}

    def write(self, checkpoint: int, number: int, rows: GradientRows) -> None:
        """Write the gradients of a pass. Raises OutputError: a full disk."""
        name, stop = f"{checkpoint}-{number}.safetensors", int(rows.ids[-1]) + 1
        unit = Unit(self.folder, name, self.columns, "values", "", 0, stop, rows.ids)
        content = encode_unit(unit, rows, None)
        try:
            stream_tensors(unit.path, content.tensors, content.metadata, direct=False)
        except OSError as error:
            raise OutputError(
                f"the gradients of the queries can't be written to {self.folder}: "
                f"{error.strerror or error}",
                *REMEDIES,
            ) from error
        self._units[checkpoint, number] = unit

    def read(self, checkpoint: int, numbers: Iterable[int]) -> Iterator[GradientRows]:
        """The gradients of these passes. It prefetches the next one."""
        with ThreadPoolExecutor(1) as thread:
            loads = ((number, self._fetch(thread, checkpoint, number)) for number in numbers)
            for _, rows in one_ahead(loads):
                yield rows

    def _fetch(self, thread: ThreadPoolExecutor, checkpoint: int, number: int) -> LoadRows:
        """Begin to read in the thread; the result waits for it, and decodes."""
        unit = self._units[checkpoint, number]
        ids = unit.example_ids
        reading = thread.submit(fetch_unit, unit, self.columns, "values", ids, self._verification)
        return lambda: reading.result()()
