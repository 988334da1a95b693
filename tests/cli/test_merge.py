"""influence merge: shards of a run merged are the run's own bytes; what can't be merged is refused; memory is flat."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from influence_cli.methods.table import METHODS
from influence_cli.output.columns import PARTS
from tests.conftest import build_run
from tests.refusals import refused, replaced

# 300 texts, many there twice and some without a gradient, so that scores are tied across shards and 0; texts that csv must quote
DEFINITION = """
import torch
from torch import nn
from torch.nn import functional as F

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(14, 6, padding_idx=0), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.mix(self.words(ids).mean(1))))

def model():
    return Reader()

def texts(seed, number, distinct):
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(1, 14, (distinct, 5), generator=generator).sort().values, torch.arange(distinct) % 4
    return torch.utils.data.TensorDataset(ids[torch.arange(number) % distinct], labels[torch.arange(number) % distinct])

def train_data():
    return texts(0, 300, 140)

def query_data():
    return texts(1, 3, 3)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1].clamp(max=2), reduction="none") * (batch[1] < 3)

def label(example):
    return "abcd"[int(example[1])]

def describe(example):
    return f'text, "{int(example[0][0])}"\\nof two lines'
"""
HEAD = "query,kind,rank,train,score,query_label,train_label,query_text,train_text\n"
ASKED = {
    "score": ["--queries", "0:3", "--top", "5"],
    "score all": ["--top", "all"],
    "score all by layer": ["--top", "all", "--by", "layer", "--queries", "0"],
    "score by layer": ["--by", "layer"],
    "score by checkpoint": ["--by", "checkpoint", "--normalize"],
    "score sum": ["--sum-queries", "--top", "7"],
    "score words": ["--method", "tracin-we", "--top", "all"],
    "score by word": ["--method", "tracin-we", "--by", "word", "--top", "20"],
    "self": [],
    "self all": ["--top", "all"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return build_run(tmp_path_factory.mktemp("merge") / "run", DEFINITION)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Enough examples that shards are cut where batches and products begin: below that, shapes differ and with them the last digits."""
    return build_run(
        tmp_path_factory.mktemp("large") / "run",
        replaced(DEFINITION, ("texts(0, 300, 140)", "texts(0, 9000, 5000)")),
    )


def parts_of(
    influence, folder: Path, count: int, *arguments: object, suffix: str = "csv"
) -> list[Path]:
    """A table per shard, the last first: the order of parts must not count."""
    paths = [folder / f"part-{number}.{suffix}" for number in range(count, 0, -1)]
    for number, path in zip(range(count, 0, -1), paths, strict=True):
        done = influence(*arguments, "--shard", f"{number}/{count}", "-o", path)
        assert done.code == 0, done.err
        assert f"note: shard {number} of {count}: " in done.err
    return paths


def top_of(flags: list[str]) -> list[str]:
    return flags[(at := flags.index("--top")) : at + 2] if "--top" in flags else []


@pytest.mark.parametrize("asked", ASKED)
def test_merged_shards_are_the_bytes_of_the_whole(asked, large, tmp_path, influence):
    command, flags = asked.split()[0], ASKED[asked]
    whole = influence(command, large, *flags, "--cache", tmp_path / "whole")
    assert whole.code == 0, whole.err
    paths = parts_of(influence, tmp_path, 2, command, large, *flags, "--cache", tmp_path / "shards")
    merged = influence("merge", *paths, *top_of(flags))
    assert merged.code == 0, merged.err
    assert merged.out == whole.out
    assert len(merged.rows) >= 10
    assert merged.err == ""


def test_small_and_empty_shards_hold_every_pair(run, tmp_path, influence):
    whole = influence("score", run, "--top", "all").rows
    paths = parts_of(influence, tmp_path, 7, "score", run, "--top", "all")
    empty = [path for path in paths if path.read_text() == HEAD]
    merged = influence("merge", *paths, "--top", "all")
    assert merged.err.splitlines() == [f"note: {path} has no rows" for path in empty]
    assert len(empty) == 2
    found = {(row["query"], row["train"]): float(row["score"]) for row in merged.rows}
    assert found == pytest.approx(
        {(row["query"], row["train"]): float(row["score"]) for row in whole}, rel=1e-4, abs=1e-9
    )


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("flags", [["--top", "all"], ["--sum-queries"]], ids=" ".join)
def test_every_format_merges_to_every_other(suffix, flags, run, tmp_path, influence):
    expected = influence(
        "merge", *parts_of(influence, tmp_path, 3, "score", run, *flags), *top_of(flags)
    )
    paths = parts_of(influence, tmp_path, 3, "score", run, *flags, suffix=suffix)
    influence("merge", *paths, *top_of(flags), "-o", tmp_path / f"all.{suffix}")
    again = influence(
        "merge", tmp_path / f"all.{suffix}", *top_of(flags)
    )  # of one part: the table itself
    assert again.code == 0, again.err
    assert again.out == expected.out


def test_a_part_comes_from_a_pipe(run, tmp_path, influence):
    first, second = parts_of(influence, tmp_path, 2, "self", run, "--top", 20)
    merged = influence("merge", "-", second, "--top", 20, stdin=first.read_text())
    assert len(merged.rows) == 20
    assert merged.out == influence("merge", first, second, "--top", 20).out


def test_fewer_rows_than_the_parts_have_can_be_asked_for(run, tmp_path, influence):
    parts = parts_of(influence, tmp_path, 2, "score", run, "--top", "all")
    (tmp_path / "4").mkdir()
    fours = parts_of(influence, tmp_path / "4", 2, "score", run, "--top", 4)
    assert influence("merge", *parts, "--top", 4).out == influence("merge", *fours, "--top", 4).out


def test_more_rows_than_the_parts_may_have_is_said(run, tmp_path, influence):
    paths = parts_of(influence, tmp_path, 2, "score", run, "--top", 4)
    assert influence("merge", *paths, "--top", 4).err == ""
    refused(influence("merge", *paths, "--top", 5), 2, "was written with --top 4")
    for path in paths:
        Path(f"{path}.meta.json").unlink()
    assert influence("merge", *paths, "--top", 5).err.endswith(
        "note: the tables hold at most 4 rows per query and kind, so rows of --top 5 may be missing. Write them with --top 5 or more.\n"
    )
    assert "at most 4 rows" in influence("merge", *paths, "--top", "all").err
    paths = parts_of(influence, tmp_path, 2, "score", run, "--top", "all", "--queries", "0")
    assert influence("merge", *paths, "--top", "all").err == ""


# ---------------------------------------------------------------- refused
GOOD = (
    HEAD
    + "0,proponent,1,25,2.0,,,,\n0,proponent,2,3,1.0,,,,\n0,opponent,1,4,-1.0,,,,\n2,proponent,1,3,1.0,,,,\n"
)
BROKEN = {
    "a column short": (HEAD + "0,proponent,1,5,2.0,,,\n", "bad.csv, line 2: 8 columns, expected 9"),
    "a blank line": (HEAD + "0,proponent,1,5,2.0,,,,\n\n", "bad.csv, line 3: 0 columns"),
    "no number": (
        HEAD + "0,proponent,1,5,2.0,,,,\n0,proponent,2,6,much,,,,\n",
        "bad.csv, line 3: score is 'much', expected a number",
    ),
    "groups": (
        HEAD + "0,proponent,1,cats,2.0,,,,\n",
        "bad.csv, line 2: train is 'cats'",
        "merge can't add sums per group",
    ),
    "a query's name": (HEAD + "every,proponent,1,6,2.0,,,,\n", "bad.csv, line 2: query is 'every'"),
    "not finite": (
        HEAD + "0,proponent,1,5,nan,,,,\n",
        "bad.csv, line 2: the score is not finite",
    ),
    "rank 0": (HEAD + "0,proponent,0,5,1.0,,,,\n", "bad.csv, line 2", "the rank is below 1"),
    "another kind": (
        HEAD + "0,friend,1,5,1.0,,,,\n",
        "bad.csv, line 2: kind is 'friend', expected proponent or opponent",
    ),
    "a score out of order": (
        HEAD + "0,proponent,1,5,1.0,,,,\n0,proponent,2,6,2.0,,,,\n",
        "bad.csv, line 3: its score belongs before the row above",
    ),
    "5,000 digits": (
        HEAD + f"0,proponent,1,{'9' * 5000},1.0,,,,\n",
        "bad.csv, line 2: train is '9999",
        "..",
    ),
    "30 digits": (HEAD + f"0,proponent,1,{'9' * 30},1.0,,,,\n", "bad.csv, line 2: train is '9999"),
    "a zero too many": (HEAD + "0,proponent,1,007,1.0,,,,\n", "line 2: train is '007'"),
    "minus zero": (HEAD + "-0,proponent,1,7,1.0,,,,\n", "line 2: query is '-0'"),
    "an underscore": (HEAD + "0,proponent,1,1_0,1.0,,,,\n", "line 2: train is '1_0'"),
    "an underscore in a score": (HEAD + "0,proponent,1,5,1_0.0,,,,\n", "line 2: score is '1_0.0'"),
    "a query below 0": (HEAD + "-1,proponent,1,5,1.0,,,,\n", "line 2", "an id is below 0"),
    "an unknown part": (
        HEAD.replace("train,", "train,\x1b[31m,", 1) + "0,proponent,1,5,x,2.0,,,,\n",
        "bad.csv is not a table of score or self",
        "train, \\x1b[31m, score",
    ),
    "ranks fall": (
        HEAD + "0,proponent,2,5,1.0,,,,\n0,proponent,1,6,2.0,,,,\n",
        "bad.csv, line 3: this row is out of order",
        "score and self write them",
    ),
    "queries fall": (
        HEAD + "2,proponent,1,9,1.0,,,,\n1,proponent,1,9,1.0,,,,\n",
        "bad.csv, line 3: this row is out of order",
    ),
    "kinds swapped": (
        HEAD + "0,opponent,1,8,-1.0,,,,\n0,proponent,1,9,1.0,,,,\n",
        "bad.csv, line 3: this row is out of order",
    ),
    "a row twice": (
        HEAD + "0,proponent,1,5,1.0,,,,\n0,proponent,1,5,1.0,,,,\n",
        "bad.csv, line 2: this row is out of order, or comes twice",
    ),
    "no columns": ("", "bad.csv can't be read: the file is empty"),
    "another table": (
        "step,score\n1,2\n",
        "bad.csv is not a table of score or self",
        "found: step, score",
    ),
    "parts of scores": (
        HEAD.replace("train,", "train,layer,", 1) + "0,proponent,1,5,0,2.0,,,,\n",
        "bad.csv has other columns than good.csv",
        "layer, score",
        "expected: query, kind, rank, train, score",
    ),
    "self": (
        "rank,train,score,loss,train_label,train_text\n1,5,2.0,0.5,,\n",
        "bad.csv has other columns than good.csv",
    ),
    "an empty first line": ("\r\n" + GOOD, "bad.csv can't be read: its first line is empty"),
    "an open quote": (
        HEAD + '0,proponent,1,8,2.0,,"\n0,proponent,2,9,1.0,,,,\n',
        "bad.csv, line 3: 7 columns",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_part_that_is_broken_is_refused_by_name_and_line(what, tmp_path, influence, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, *says = BROKEN[what]
    Path("good.csv").write_text(GOOD)
    Path("bad.csv").write_text(text)
    refused(influence("merge", "good.csv", "bad.csv", "-o", "out.csv"), 1, *says)
    assert not Path("out.csv").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path, influence):
    (tmp_path / "bad.csv").write_bytes(HEAD.encode() + b"0,proponent,1,5,2.0,\xff,,,\n")
    refused(influence("merge", tmp_path / "bad.csv"), 1, "bad.csv can't be read", "utf-8")


JSON_ROW = (
    '{"query": 0, "kind": "proponent", "rank": 1, "train": 4, "score": 2.5, '
    '"query_label": "a", "train_label": "b", "query_text": "x", "train_text": "y"}\n'
)
BROKEN_JSON = {
    "nested 5,000 deep": ('"y"', "[" * 5000 + "]" * 5000, "nested too deep"),
    "an id of 5,000 digits": ("4,", "9" * 5000 + ",", "999... of 5000 digits is too large"),
    "a score of 400 digits": ("2.5", "9" * 400, "999... of 400 digits is too large"),
    "a score of 19 digits": ("2.5", "1" + "0" * 19, "the score is not finite"),
    "an infinite score": ("2.5", "1e400", "line 1: the score is not finite"),
    "a fraction": ("4,", "4.7,", "train is 4.7, expected a number"),
    "true": ("4,", "true,", "train is True, expected a number"),
    "a key twice": ('"score"', '"train"', "has the key 'train' twice"),
    "half a surrogate pair": ('"y"', '"\\ud800"', "no valid UTF-8 text"),
    "a list": ('"y"', "[1]", "train_text is [1], expected a text"),
    "no object": (JSON_ROW, "[1, 2]\n", "found [1, 2], expected a JSON object"),
    "an empty object": (JSON_ROW, "{}\n" + JSON_ROW, "found {}, expected a JSON object"),
    "10 MB": ('"kind": "pro', '"kind": "' + "x" * 10_000_000, "line 1: kind is 'xxxx"),
}


@pytest.mark.parametrize("what", BROKEN_JSON)
def test_a_broken_json_part_ends_in_one_short_message(what, tmp_path, influence):
    old, new, says = BROKEN_JSON[what]
    (tmp_path / "bad.jsonl").write_text(JSON_ROW.replace(old, new, 1))
    result = influence("merge", tmp_path / "bad.jsonl")
    refused(result, 1, "bad.jsonl", says)
    assert len(result.err) < 1000


def test_parts_of_a_score_whose_sum_is_too_large_are_refused(tmp_path, influence):
    rows = "".join(f"0,proponent,1,5,layer {at},1e308,,,,\n" for at in range(3))
    (tmp_path / "bad.csv").write_text(HEAD.replace("train,", "train,layer,", 1) + rows)
    refused(influence("merge", tmp_path / "bad.csv"), 1, "line 2: the sum of its parts")


def test_merge_knows_the_parts_of_every_method():
    assert {part for method in METHODS.values() for part in method.parts} == set(PARTS)


@pytest.mark.parametrize("size", [0, 100, 400])
def test_a_cut_parquet_part_ends_in_one_message(size, tmp_path, influence):
    pytest.importorskip("pyarrow")
    (tmp_path / "good.csv").write_text(GOOD)
    influence("merge", tmp_path / "good.csv", "-o", tmp_path / "bad.parquet")
    with (tmp_path / "bad.parquet").open("rb+") as file:
        file.truncate(size)
    refused(influence("merge", tmp_path / "bad.parquet"), 1, "bad.parquet can't be read")


def test_a_changed_byte_of_a_parquet_part_is_refused_or_harmless(tmp_path, influence):
    pytest.importorskip("pyarrow")
    (tmp_path / "good.csv").write_text(GOOD)
    part = tmp_path / "part.parquet"
    influence("merge", tmp_path / "good.csv", "-o", part)
    content, refusals = part.read_bytes(), 0
    expected = influence("merge", part).out
    for at in range(4, len(content) - 8, 32):
        part.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        result = influence("merge", part)
        assert "Traceback" not in result.err
        assert result.code == 1 or result.out == expected, at
        refusals += result.code == 1
    assert refusals > 10


def test_json_rows_must_be_alike(tmp_path, influence):
    rows = [
        dict(
            zip(
                HEAD.strip().split(","),
                [0, "proponent", rank, rank, 3.0 - rank, "", "", "", ""],
                strict=True,
            )
        )
        for rank in (1, 2)
    ]
    del rows[1]["score"]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(
        influence("merge", tmp_path / "bad.jsonl", "-o", tmp_path / "out.csv"),
        1,
        "bad.jsonl can't be read after line 1",
        "expected query",
    )
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0]) + "\n{'no': json}\n")
    refused(
        influence("merge", tmp_path / "bad.jsonl", "-o", tmp_path / "out.csv"),
        1,
        "bad.jsonl can't be read after line 1",
    )


@pytest.mark.parametrize("kind", ["proponent,1,3,9.0", "opponent,1,3,-9.0"])
def test_a_pair_that_comes_twice_is_refused_naming_both_parts(
    kind, tmp_path, influence, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("one.csv").write_text(GOOD)
    Path("two.csv").write_text(
        HEAD + f"1,{kind},,,,\n2,{kind},,,,\n"
    )  # of query 1 one.csv has nothing
    result = influence("merge", "one.csv", "two.csv", "-o", "out.csv")
    refused(
        result,
        1,
        "training example 3 of query 2 is in both",
        "one.csv",
        "two.csv",
        "each shard once",
    )
    assert not Path("out.csv").exists()


def test_a_table_that_is_given_twice_is_refused_under_any_name(tmp_path, influence, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.csv").write_text(GOOD)
    Path("link.csv").symlink_to("one.csv")
    refused(influence("merge", "one.csv", "one.csv"), 2, "one.csv is given twice\n", "leave one")
    refused(influence("merge", "one.csv", "./one.csv"), 2, "./one.csv is given twice, also as one")
    refused(
        influence("merge", "link.csv", "one.csv"), 2, "one.csv is given twice, also as link.csv"
    )


def test_parts_that_are_not_there_are_refused(tmp_path, influence):
    refused(influence("merge", tmp_path / "none.csv"), 2, "none.csv can't be read: No such file")
    refused(influence("merge", "-", "-", stdin=GOOD), 2, "two parts are -")
    assert influence("merge").code == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--group-by", "label"], ("--group-by sums over all training examples", "torchrun")),
        (
            ["--method", "dve"],
            ("--shard does not apply to --method dve", "--queries divides its work"),
        ),
        (
            ["--method", "unroll"],
            ("--shard does not apply to --method unroll", "--queries divides its work"),
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_can_not_be_done_in_shards_is_refused(flags, says, run, influence):
    refused(influence("score", run, "--shard", "1/2", *flags), 2, *says)


@pytest.mark.parametrize("command", ["cache", "score", "self"])
def test_a_wrong_shard_is_refused_before_any_work(command, run, influence):
    refused(influence(command, run, "--shard", "3/2"), 2, "--shard 3/2: no such shard")


def test_cached_shards_are_what_scoring_all_needs(run, tmp_path, influence):
    for number in (1, 2, 3):
        assert (
            influence("cache", run, "--cache", tmp_path / "cache", "--shard", f"{number}/3").code
            == 0
        )
    result = influence("cache", run, "--cache", tmp_path / "cache")
    assert "train: 0 gradients computed, 600 were stored already" in result.err


# ---------------------------------------------------------------- memory
FLAT = """
import resource, sys
from influence_cli.output import merge
count = int(sys.argv[1])
parts, columns = merge.open_tables(sys.argv[2:], sys.stdin)
rows = sum(1 for _ in merge.merge_tables(parts, columns, None))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_is_flat_in_the_number_of_rows(tmp_path):
    def run(count: int) -> tuple[int, int]:
        for number in (0, 1):
            with (tmp_path / f"{number}.csv").open("w") as file:
                file.write(HEAD)
                for rank in range(1, count + 1):
                    file.write(
                        f"0,proponent,{rank},{2 * rank + number},{1 / rank},label,label,some text,some other text\n"
                    )
        command = [
            sys.executable,
            "-c",
            FLAT,
            str(count),
            str(tmp_path / "0.csv"),
            str(tmp_path / "1.csv"),
        ]
        rows, peak = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()
        return int(rows), int(peak)

    (_, few), (rows, many) = run(1_000), run(50_000)
    assert rows == 100_000
    assert many - few < 8_000, (
        f"{many - few} KiB more for 50 times the rows"
    )  # the rows would be 33 MB
