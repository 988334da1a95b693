"""Where a table goes: stdout, or a file that appears complete or not at all."""

import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from influence_cli.errors import OutputError, UsageProblem
from influence_cli.output.columns import Row
from influence_cli.output.formats import (
    DELIMITERS,
    format_of,
    prefix_formulas,
    require_pyarrow,
    write_rows,
)
from influence_cli.output.table_record import (
    MakeRecord,
    Record,
    describe_command,
    record_path,
    write_record,
)
from influence_cli.output.visible import LINE_CHARACTERS, escape_controls
from influence_cli.storage.atomic import (
    describe_disk_error,
    open_special,
    remove_stale_siblings,
    replace_text_file,
)

FORMATS = ("table", "csv", "tsv", "jsonl", "parquet")


@dataclass(frozen=True)
class TableWriter:
    """Writes one table. `output` None: to stdout."""

    format: str
    output: Path | None
    stdout: IO[str]
    safe_cells: bool = False

    @classmethod
    def open(
        cls,
        requested: str | None,
        output: Path | None,
        stdout: IO[str] | None = None,
        safe_cells: bool = False,
    ) -> "TableWriter":
        """The format is `--format`, else the ending of the file, else `table` for a terminal and
        csv for a pipe.

        Raises UsageProblem before any work: for an unknown format, or a missing folder or library.
        """
        stdout = stdout or sys.__stdout__
        if stdout is None and output is None:
            raise OutputError("stdout is closed", "write to a file: -o FILE")
        stdout = stdout or sys.stderr
        if requested:
            format = requested
        elif output:
            format = format_of(output)
        else:
            format = "table" if stdout.isatty() else "csv"
        if format not in FORMATS:
            raise UsageProblem(f"--format {format}: unknown", f"expected: {', '.join(FORMATS)}")
        if safe_cells and format not in DELIMITERS:
            raise UsageProblem(
                f"--safe-cells is for spreadsheets, the format is {format}",
                "add --format csv, or leave out --safe-cells",
            )
        if output is not None:
            check_file_name(output)
        if format == "parquet":
            require_pyarrow("--format parquet")
            if output is None and stdout.isatty():
                raise UsageProblem(
                    "--format parquet is binary, and stdout is a terminal",
                    "write it to a file: -o FILE",
                )
        return cls(format, output, stdout, safe_cells)

    def write(self, rows: Iterable[Row], columns: Sequence[str], made: MakeRecord = dict) -> None:
        """Write a table, and its record if it has one. An error before the first row leaves
        stdout empty. `made`: adds to the record.
        """
        file_has_record = self.output is not None and not is_special(self.output)
        record: Record | None = None
        if file_has_record or self.format == "parquet":
            record = {**describe_command(), **made()}
        rows = iter(rows)
        rows = itertools.chain(list(itertools.islice(rows, 1)), rows)
        if self.safe_cells:
            rows = prefix_formulas(rows, columns)
        with to_stdout(self.stdout) if self.output is None else to_file(self.output) as file:
            if isinstance(file, io.TextIOWrapper):  # a lone surrogate has no UTF-8: \\ud800
                file.reconfigure(errors="backslashreplace")
            if self.format != "table" and file.isatty():
                rows = escape_texts(rows)
            if self.format == "table":
                from influence_cli.output.terminal import print_rows  # imports rich

                print_rows(rows, columns, file)
            else:
                write_rows(rows, columns, self.format, file, record)
        if record is not None and self.output is not None and self.format != "parquet":
            with report_output_errors(record_path(self.output)):
                write_record(self.output, record)


def write_lines(lines: Iterable[str], output: Path | None) -> None:
    """Write texts, one a line, to a file or stdout. Raises OutputError."""
    stdout = sys.__stdout__
    if stdout is None and output is None:
        raise OutputError("stdout is closed", "write to a file: -o FILE")
    with to_file(output) if output is not None else to_stdout(stdout or sys.stderr) as file:
        if isinstance(file, io.TextIOWrapper):  # as in a table
            file.reconfigure(errors="backslashreplace")
        shows = escape_controls if file.isatty() else str
        file.writelines(f"{shows(line)}\n" for line in lines)


def escape_texts(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows for a terminal. A line end in a text stays: it can't act on the terminal."""
    for row in rows:
        yield [
            escape_controls(cell, LINE_CHARACTERS) if isinstance(cell, str) else cell
            for cell in row
        ]


def check_file_name(output: Path, flag: str = "-o") -> None:
    """Raises UsageProblem if no file can have this name, which `flag` gives."""
    if output.is_dir():
        raise UsageProblem(f"{flag} {output} is a folder", "expected: the name of a file")
    if not output.absolute().parent.is_dir():
        raise UsageProblem(
            f"{flag} {output}: its folder does not exist",
            f"create the folder: mkdir -p {output.parent}",
        )


@contextmanager
def to_stdout(stdout: IO[str]) -> Iterator[IO[str]]:
    """Flushes at the end. Raises OutputError if stdout can't be written, but BrokenPipeError for a
    closed pipe.
    """
    try:
        yield stdout
        stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            describe_disk_error("stdout", error),
            "free some space, or write to another place",
        ) from error


@contextmanager
def to_file(path: Path) -> Iterator[IO[str]]:
    """A text file that replaces `path`, or the target of a link, when it is complete.

    A device or a pipe is written as it is. Raises OutputError on a disk error.
    """
    with report_output_errors(path):
        if is_special(path):
            with open_special(path) as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        remove_stale_siblings(target)
        with replace_text_file(target) as file:
            yield file


def is_special(path: Path) -> bool:
    """Whether a device or a pipe has this name, possibly through a link."""
    return path.exists() and not path.is_file()


@contextmanager
def report_output_errors(path: Path) -> Iterator[None]:
    """Raises OutputError for a disk error, but BrokenPipeError for a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            describe_disk_error(path, error),
            "nothing was written; name another place: -o FILE",
        ) from error
