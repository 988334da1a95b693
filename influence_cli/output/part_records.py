"""Checks, before a merge, that the parts answer one request and complete each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from influence_cli.errors import TableError, UsageProblem, counted, listed
from influence_cli.output.table_record import Record, read_record


@dataclass(frozen=True)
class CheckedParts:
    """The request of the parts that have a record, None if none has; and the parts without one."""

    request: Record | None
    without_record: list[str]


def check_parts(names: Sequence[str], k: int | None, top: str) -> CheckedParts:
    """Raises TableError for a part that does not complete the others, UsageProblem if the parts
    hold fewer rows than --top asks for. `k`: --top as a number, None for all.
    """
    records = {name: record for name in names if (record := read_record(name)) is not None}
    records = {name: record for name, record in records.items() if record.get("request")}
    without_record = [name for name in names if name not in records]
    if not records:
        return CheckedParts(None, without_record)
    first = next(iter(records))
    request = records[first]["request"]
    for name, record in records.items():
        check_same_request(name, record["request"], first, request)
        rows = record.get("top")
        if rows is not None and (k is None or k > rows):
            raise UsageProblem(
                f"--top {top}: {name} was written with --top {rows}, so rows would be missing",
                f"write the parts with --top {top} or more, or merge with --top {rows} or less",
            )
    check_shards(names, {name: record.get("shard") for name, record in records.items()})
    return CheckedParts(request, without_record)


def check_same_request(name: str, request: Record, first: str, expected: Record) -> None:
    keys = [*expected, *(key for key in request if key not in expected)]
    different = [key for key in keys if request.get(key) != expected.get(key)]
    if different:
        key = different[0]
        raise TableError(
            f"{name} answers another question than {first}: {listed(different)}",
            f"found    {key}: {str(request.get(key))[:150]}",
            f"expected {key}: {str(expected.get(key))[:150]}",
            "run the same command for each shard",
        )


def check_shards(names: Sequence[str], shards: dict[str, list[int] | None]) -> None:
    """Raises TableError unless the shards are all of one count, each once.

    Parts without a record count as the shards that the others leave.
    """
    owners: dict[int, str] = {}
    first, expected = next(iter(shards.items()))
    for name, shard in shards.items():
        if shard is None or expected is None:
            if len(names) > 1:
                complete = name if shard is None else first
                raise TableError(
                    f"{complete} is a whole table, not a shard", "leave it out, or merge it alone"
                )
            return
        index, count = shard
        if count != expected[1]:
            raise TableError(
                f"{name} is shard {index} of {count}, {first} is shard {expected[0]} of "
                f"{expected[1]}",
                "n of --shard i/n must be the same in all tables",
            )
        if index in owners:
            raise TableError(
                f"{name} and {owners[index]} are both shard {index} of {count}",
                "give each shard once",
            )
        owners[index] = name
    assert expected is not None
    count = expected[1]
    if len(names) != count:
        missing = [index for index in range(1, min(count, 10**6) + 1) if index not in owners]
        tables = counted(len(names), "table")
        raise TableError(
            f"merge got {tables}, but {first} is shard {expected[0]} of {count}",
            f"found: {tables}; expected: {count}"
            + (f"; missing: shard {listed(missing)} of {count}" if len(names) < count else ""),
            "give the table of each shard once",
        )
