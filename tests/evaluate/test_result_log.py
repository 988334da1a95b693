"""A log that several processes share."""

import pytest

from influence_cli.errors import CacheError
from influence_cli.evaluate.result_log import ResultLog, total_seconds


@pytest.fixture
def path(tmp_path):
    return tmp_path / "evaluate" / "log.jsonl"


def test_two_processes_with_the_same_results_write_the_log_of_one(path, tmp_path):
    records = [{"step": step, "truth": [0.1 * step]} for step in range(4)]
    alone = tmp_path / "alone" / "log.jsonl"
    for record in records:
        ResultLog(alone).add(record)
    one, two = ResultLog(path), ResultLog(path)
    for log, record in ((one, 0), (two, 0), (two, 1), (two, 2), (one, 1), (one, 2), (one, 3)):
        log.add(records[record])
    two.add(records[3])
    assert path.read_bytes() == alone.read_bytes()
    assert one.records == two.records == ResultLog(path).records == records


def test_a_line_that_a_killed_process_cut_is_dropped_by_a_living_one(path):
    log = ResultLog(path)
    log.add({"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2')
    log.add({"step": 3})
    assert ResultLog(path).records == [{"step": 1}, {"step": 3}]


def test_a_damaged_line_is_named(path):
    log = ResultLog(path)
    log.add({"step": 1})
    log.add({"step": 2})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"2", b"3", 1))
    with pytest.raises(CacheError, match="line 2 can't be read"):
        ResultLog(path)


def test_the_seconds_of_a_result_do_not_make_it_another_one(path):
    one, two = ResultLog(path), ResultLog(path)
    one.add({"step": 1, "seconds": 2.0})
    two.add({"step": 1, "seconds": 3.0})
    assert two.records == ResultLog(path).records == [{"step": 1, "seconds": 2.0}]
    assert total_seconds([*two.records, {"step": 2, "seconds": 1.5}]) == 3.5
    assert total_seconds([*two.records, {"step": 2}]) is None  # of an older version
