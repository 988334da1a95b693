"""Each file says how it was made, and merge refuses parts that do not complete each other."""

import json
import os
import shutil
import socket
import stat
import threading
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import DEFINITION, build_run
from tests.refusals import refused, replaced


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    text = replaced(DEFINITION, ("examples(0, 20)", "examples(0, 300)"))
    return build_run(tmp_path_factory.mktemp("records") / "run", text)


@pytest.fixture
def write_part(run, tmp_path, influence):
    """write_part("a.csv", "1/2", *flags) -> the path of a part."""

    def write(name: str, shard: str | None, *flags: object, folder: Path = run) -> Path:
        shards = ("--shard", shard) if shard else ()
        done = influence("score", folder, *shards, *flags, "-o", tmp_path / name)
        assert done.code == 0, done.err
        return tmp_path / name

    return write


def test_the_temporary_record_of_a_killed_command_is_removed(run, tmp_path, influence):
    left = tmp_path / f".tmp-{socket.gethostname()}-{'0' * 16}-scores.csv.meta.json"
    left.write_text("{")
    assert influence("score", run, "-o", tmp_path / "scores.csv").code == 0
    assert not left.exists()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_file_has_its_record_beside_it(suffix, run, tmp_path, influence):
    path = tmp_path / f"scores.{suffix}"
    assert influence("score", run, "--top", 3, "-o", path).code == 0
    record = json.loads((tmp_path / f"scores.{suffix}.meta.json").read_text())
    assert {"command", "versions", "request", "shard", "top", "bytes", "sha256", "crc32"} == set(
        record
    )
    assert record["bytes"] == path.stat().st_size
    assert set(record["versions"]) >= {"influence", "python", "torch"}
    assert len(record["request"]["checkpoints"]) == 2
    assert len(record["request"]["definition"]) == 64
    if suffix == "jsonl":  # each line is a row
        lines = path.read_text().splitlines()
        assert all(list(json.loads(line))[:2] == ["query", "kind"] for line in lines)


def test_parquet_holds_its_record(run, tmp_path, influence):
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "part.parquet"
    assert influence("score", run, "--shard", "2/2", "-o", path).code == 0
    record = json.loads(pq.read_schema(path).metadata[b"influence"])
    assert record["shard"] == [2, 2]
    assert list(tmp_path.iterdir()) == [path]


OTHER = {
    "method": (["--method", "grad-dot"], "method"),
    "queries": (["--queries", "0:3"], "queries"),
    "training examples": (["--train", "0:290"], "train"),
    "checkpoints": (["--steps", "10"], "checkpoints"),
    "a learning rate": (["--lr", "0.5"], "lr"),
    "layers": (["--layers", "0.*"], "layers"),
    "a precision": (["--precision", "float64"], "settings"),
}


@pytest.mark.parametrize("what", OTHER)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_part_of_another_request_is_refused(what, suffix, write_part, influence):
    flags, key = OTHER[what]
    first = write_part(f"a.{suffix}", "1/2")
    second = write_part(f"b.{suffix}", "2/2", *flags)
    refused(influence("merge", first, second), 1, f"{second} answers another question", key)


def test_a_part_of_another_run_is_refused(tmp_path, write_part, influence):
    text = replaced(DEFINITION, ("examples(0, 20)", "examples(7, 300)"))
    other = build_run(tmp_path / "other", text)
    parts = write_part("a.csv", "1/2"), write_part("b.csv", "2/2", folder=other)
    refused(influence("merge", *parts), 1, "b.csv answers another question", "definition")


def test_a_part_of_other_checkpoints_is_refused(run, tmp_path, write_part, influence):
    shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns(".influence"))
    path = tmp_path / "other" / "checkpoints" / "step-000010.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata)
    first = write_part("a.csv", "1/2")
    second = write_part("b.csv", "2/2", folder=tmp_path / "other")
    refused(influence("merge", first, second), 1, "b.csv answers another question", "checkpoints")


def test_missing_repeated_and_foreign_shards_are_refused(write_part, influence):
    one, two, three = (write_part(f"{number}.csv", f"{number}/3") for number in (1, 2, 3))
    again, half, whole = (
        write_part("again.csv", "1/3"), write_part("half.csv", "2/2"), write_part("whole.csv", None)
    )  # fmt: skip
    assert influence("merge", one, two, three).code == 0
    refused(influence("merge", one, three), 1, "merge got 2 tables", "missing: shard 2 of 3")
    refused(influence("merge", two), 1, "merge got 1 table, but", "missing: shard 1, 3 of 3")
    refused(influence("merge", one, two, again), 1, "are both shard 1 of 3")
    refused(influence("merge", one, half, three), 1, "half.csv is shard 2 of 2")
    refused(influence("merge", whole, one), 1, "whole.csv is a whole table")
    assert influence("merge", whole).code == 0


@pytest.mark.parametrize("change", ["cut", "edited"])
def test_a_part_that_was_cut_or_changed_is_refused(change, write_part, influence):
    parts = write_part("a.csv", "1/2"), write_part("b.csv", "2/2")
    text = parts[1].read_text()
    rows = text.splitlines(keepends=True)
    parts[1].write_text("".join(rows[:-1]) if change == "cut" else text.replace("0.", "1.", 1))
    refused(influence("merge", *parts), 1, "b.csv is not the table that b.csv.meta.json describes")


def test_parts_without_a_record_are_named(write_part, influence):
    parts = write_part("a.csv", "1/2"), write_part("b.csv", "2/2")
    Path(f"{parts[1]}.meta.json").unlink()
    result = influence("merge", *parts)
    assert result.code == 0
    assert f"note: no record of how {parts[1]} was made" in result.err
    refused(influence("merge", parts[0]), 1, "missing: shard 2 of 2")


@pytest.mark.parametrize("content", [
    "", "[]", "{", "[" * 5000, '{"a":' * 5000, '{"shard": [1e400, 2]}', '{"shard": [2, 1]}', '{"request": 5}',
    '{"top": ' + "9" * 5000 + "}", '{"shard": [1, ' + "9" * 400 + "]}", '"' + "x" * 10_000_000, '{"bytes": "\\ud800"}',
], ids=lambda content: content[:12])  # fmt: skip
def test_a_broken_record_is_refused(content, write_part, influence):
    part = write_part("a.csv", "1/2")
    Path(f"{part}.meta.json").write_text(content)
    result = influence("merge", part)
    refused(result, 1, "a.csv")
    assert len(result.err) < 2000


def test_a_merged_table_has_the_record_of_the_whole(write_part, tmp_path, influence):
    whole, parts = write_part("whole.csv", None), [write_part(f"{n}.csv", f"{n}/2") for n in (1, 2)]
    assert influence("merge", *parts, "-o", tmp_path / "merged.csv").code == 0
    records = [json.loads(Path(f"{p}.meta.json").read_text()) for p in (whole, tmp_path / "merged.csv")]  # fmt: skip
    assert records[0]["request"] == records[1]["request"]
    assert records[1]["shard"] is None


# ---------------------------------------------------------------- -o
def test_a_link_stays_and_its_target_is_replaced(run, tmp_path, influence):
    target, link = tmp_path / "there" / "real.csv", tmp_path / "link.csv"
    target.parent.mkdir()
    target.write_text("before")
    target.chmod(0o640)
    link.symlink_to(target)
    assert influence("score", run, "--queries", "0", "-o", link).code == 0
    assert link.is_symlink()
    assert target.read_text().startswith("query,kind")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert influence("merge", link).code == 0


def test_a_pipe_with_a_name_is_written_through(run, tmp_path, influence):
    fifo, received = tmp_path / "fifo.csv", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: received.append(fifo.read_text()))
    reader.start()
    assert influence("score", run, "--queries", "0", "-o", fifo).code == 0
    reader.join(10)
    assert received[0].startswith("query,kind")
    assert list(tmp_path.iterdir()) == [fifo]


def test_a_device_is_written_through(run, influence):
    assert influence("score", run, "--queries", "0", "-o", "/dev/null").code == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    refused(influence("score", run, "-o", "/dev/full"), 1, "/dev/full can't be written")
