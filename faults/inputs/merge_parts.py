"""Parts of a merge: csv, tsv, JSONL and Parquet, and the records beside them."""

import csv
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from faults.inputs.target import SilentFault, Target, expect
from faults.mutate import extreme_values, mutate_bytes, strict_json
from faults.strategies import json_texts, texts
from influence_cli.output.columns import SCORE_COLUMNS
from influence_cli.output.formats import write_rows
from influence_cli.output.merge import merge_tables, open_tables
from influence_cli.output.part_records import check_parts
from influence_cli.output.table_record import parse_record
from influence_cli.storage.atomic import replace_text_file

ROWS: tuple[tuple[Any, ...], ...] = (  # Any: cells
    (0, "proponent", 1, 4, 2.5, "a", "b", "x", "y"),
    (0, "proponent", 2, 3, 1.5, "a", "b", "x", "y"),
    (0, "opponent", 1, 7, -2.5, "a", "b", "x", "y"),
    (1, "proponent", 1, 4, 0.5, "a", "b", "x", "y"),
)
OTHER = [(*row[:3], row[3] + 10, row[4], *row[5:]) for row in ROWS]
CELLS = ("", "0", "-1", "1_0", "٣", "9" * 30, "9" * 5000, "1e400", "nan", "inf", "true", "4.7", "all", "\x1b[31m", " 5", "5 ")  # fmt: skip
Cells = list[dict[str, Any]]  # Any: cells as a reader of the format gives them


def encode(rows: Any, format: str, folder: Path) -> bytes:
    path = folder / f"encoded.{format}"
    with replace_text_file(path) as file:
        write_rows(rows, SCORE_COLUMNS, format, file)
    return path.read_bytes()


def read_csv(text: bytes, delimiter: str) -> Cells:
    lines = csv.reader(io.StringIO(text.decode(), newline=""), delimiter=delimiter)
    header, *rows = list(lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def read_jsonl(text: bytes) -> Cells:
    return [strict_json(line, finite=False) for line in text.split(b"\n") if line]


READERS: dict[str, Callable[[bytes], Cells]] = {
    "csv": partial(read_csv, delimiter=","),
    "tsv": partial(read_csv, delimiter="\t"),
    "jsonl": read_jsonl,
}


def is_whole(cell: object) -> bool:
    """Whether a cell is a whole number in plain digits, as `score` writes it."""
    if isinstance(cell, str):
        return cell.removeprefix("-").isdigit() and cell.isascii()
    return isinstance(cell, int) and not isinstance(cell, bool)


def compare_rows(merged: list[dict[str, Any]], own: Cells) -> None:
    """The merged table has each row of the part, with its cells, and no others."""
    others = {row[3] for row in OTHER}
    rows = {
        (str(row["query"]), row["kind"], row["train"]): row
        for row in merged
        if row["train"] not in others
    }
    expect(len(rows) == sum(int(row["train"]) not in others for row in own), "rows more or less")
    for row in own:
        expect(is_whole(row["train"]) and is_whole(row["rank"]), "an id that is no whole number")
        query = str(int(row["query"])) if is_whole(row["query"]) else str(row["query"])  # -0 is 0
        merged_row = rows.get((query, row["kind"], int(row["train"])))
        if int(row["train"]) in others:
            continue
        expect(merged_row is not None, "a row is lost")
        assert merged_row is not None
        expect(merged_row["score"] == float(row["score"]), "another score")
        expect((merged_row["train_text"] or "") == (row["train_text"] or ""), "another text")


def check_merged(merged: list[dict[str, Any]]) -> None:
    """Sections are together, ranks count from 1, and scores fall (opponents: rise)."""
    last: tuple[Any, Any] | None = None  # Any: a query and a kind
    seen = set()
    for row in merged:
        section = (row["query"], row["kind"])
        key = -row["score"] if row["kind"] == "proponent" else row["score"]
        expect(math.isfinite(row["score"]), "a score that is not finite")
        if section != last:
            expect(section not in seen, "sections are mixed")
            seen.add(section)
            last, rank, last_key = section, 0, key
        expect(row["rank"] == rank + 1, "ranks do not count from 1")
        expect(key >= last_key, "scores do not fall")
        rank, last_key = row["rank"], key


def read_strictly(text: bytes, format: str) -> Cells:
    try:
        return READERS[format](text)
    except (ValueError, csv.Error) as error:
        raise SilentFault(f"a strict parser refuses: {type(error).__name__}") from error


def make_part_target(format: str, folder: Path, weight: float) -> Target:
    """Parquet has one reader only, so an accepted mutation must have the rows of the original."""
    one, two = folder / f"part-1.{format}", folder / "part-2.csv"
    valid = encode(ROWS, format, folder)
    original = [dict(zip(SCORE_COLUMNS, row, strict=True)) for row in ROWS]

    def read_own(text: bytes) -> Cells:
        return original if format == "parquet" else read_strictly(text, format)

    def parse(text: bytes) -> None:
        one.write_bytes(text)
        tables, columns = open_tables([str(one), str(two)], io.StringIO())
        merged = [
            dict(zip(columns, row, strict=True)) for row in merge_tables(tables, columns, None)
        ]
        check_merged(merged)
        compare_rows(merged, read_own(text))

    def make(rng: random.Random) -> bytes:
        if format == "parquet" or rng.random() < 0.6:
            return mutate_bytes(valid, rng)
        rows = [list(row) for row in ROWS]
        rng.choice(rows)[rng.randrange(len(SCORE_COLUMNS))] = rng.choice(CELLS)
        if format == "jsonl":
            return "".join(
                json.dumps(dict(zip(SCORE_COLUMNS, row, strict=True))) + "\n" for row in rows
            ).encode()
        return encode(rows, format, folder)

    def extremes() -> Iterator[bytes]:
        yield from extreme_values(valid.replace(b",4,", b',"4",') if format == "csv" else valid)

    strategy = part_rows().map(lambda rows: encode(rows, format, folder))
    return Target(
        f"merge part ({format})", make, parse, weight, extremes=extremes,
        strategy=None if format == "parquet" else strategy,
    )  # fmt: skip


@st.composite
def part_rows(draw: st.DrawFn) -> list[list[Any]]:
    """Rows in order with texts of any characters; now and then one cell of another kind."""
    rows: list[list[Any]] = []
    cell = texts.map(lambda text: text.encode("utf-8", "backslashreplace").decode())
    for query in draw(st.lists(st.integers(0, 3), unique=True, max_size=3).map(sorted)):
        scores = draw(
            st.lists(st.floats(0, 1e300), max_size=3).map(lambda all: sorted(all, reverse=True))
        )
        trains = draw(st.permutations(range(6)))
        for rank, (score, train) in enumerate(zip(scores, trains, strict=False), start=1):
            rows.append(
                [query, "proponent", rank, train, score, *draw(st.tuples(cell, cell, cell, cell))]
            )
    return rows


# ---------------------------------------------------------------- records
RECORD = (
    b'{"command": ["influence", "score"], "versions": {"torch": "2.5"}, "shard": [1, 2], '
    b'"request": {"method": "tracin", "queries": [0, 1], "lr": null}, "top": 5}'
)


def make_record_target(folder: Path) -> Target:
    """FILE.meta.json, and parts that should complete each other."""
    place = folder / "records"
    place.mkdir()

    def parse(text: bytes) -> None:
        record = parse_record(place / "x.meta.json", text)
        content = strict_json(text)
        expect(record == content, "another record")
        shard, top = record.get("shard"), record.get("top")
        expect(shard is None or 1 <= shard[0] <= shard[1], "no such shard")
        expect(top is None or (type(top) is int and top >= 1), "no such --top")
        check_parts([str(place / "absent.csv")], None, "all")

    return Target(
        "record of a table", lambda rng: mutate_bytes(RECORD, rng), parse, 20,
        extremes=partial(extreme_values, RECORD), strategy=json_texts(RECORD),
    )  # fmt: skip


def make_targets(folder: Path) -> list[Target]:
    (folder / "part-2.csv").write_bytes(encode(OTHER, "csv", folder))
    return [
        make_part_target("csv", folder, 20),
        make_part_target("tsv", folder, 20),
        make_part_target("jsonl", folder, 20),
        make_part_target("parquet", folder, 10),
        make_record_target(folder),
    ]
