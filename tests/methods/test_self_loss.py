"""The loss of `self`: which loss it is, and what sorting by it does."""

import csv
import io
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.conftest import DEFINITION, build_run
from tests.refusals import refused, replaced

HEAD = "rank,train,score,loss,train_label,train_text"
SIGNED = replaced(
    DEFINITION,
    ('reduction="none")', 'reduction="none") - 1.2'),  # as a likelihood of real numbers: below 0
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("losses") / "run", SIGNED)


def losses_at(run, step: int) -> list[float]:
    """Each example's loss, in a batch of one."""
    space: dict = {"__name__": "definition_of_a_test"}
    exec((run / "definition.py").read_text(), space)
    model = space["model"]()
    model.load_state_dict(load_file(run / "checkpoints" / f"step-{step:06d}.safetensors"))
    with torch.no_grad():
        return [
            float(F.cross_entropy(model(x[None]), y[None]) - 1.2) for x, y in space["train_data"]()
        ]


@pytest.mark.parametrize("cache", [[], ["--cache", "none"]])
@pytest.mark.parametrize(("flags", "step"), [([], 20), (["--steps", "10"], 10)])
def test_the_loss_is_the_examples_at_the_last_selected_checkpoint(
    run, influence, cache, flags, step
):
    result = influence("self", run, "--top", "all", *flags, *cache)
    assert result.out.splitlines()[0] == HEAD
    expected = losses_at(run, step)
    assert len(result.rows) == 20
    for row in result.rows:
        assert float(row["loss"]) == pytest.approx(expected[int(row["train"])], abs=1e-6)


@pytest.mark.parametrize("top", ["7", "all"])
def test_sort_loss_ranks_all_examples_by_loss(run, influence, top):
    """Losses below 0 rank behind those above 0, in one row of ranks."""
    rows = influence("self", run, "--sort", "loss", "--top", top).rows
    expected = losses_at(run, 20)
    order = sorted(range(20), key=lambda index: -expected[index])[: None if top == "all" else 7]
    assert [int(row["train"]) for row in rows] == order
    assert [int(row["rank"]) for row in rows] == list(range(1, len(order) + 1))
    assert min(expected) < 0 < max(expected)


def test_both_orders_have_the_same_scores(run, influence):
    by_score = influence("self", run, "--top", "all").rows
    by_loss = influence("self", run, "--top", "all", "--sort", "loss").rows
    cells = [
        {(row["train"], row["score"], row["loss"]) for row in rows} for rows in (by_score, by_loss)
    ]
    assert cells[0] == cells[1]
    assert [row["train"] for row in by_score] != [row["train"] for row in by_loss]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("sort", ["score", "loss"])
def test_merged_shards_are_the_whole_in_both_orders(run, influence, tmp_path, sort, suffix):
    whole = influence("self", run, "--sort", sort, "--top", "6")
    parts = [tmp_path / f"part-{number}.{suffix}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        flags = ("--sort", sort, "--top", "6", "--shard", f"{number}/2", "-o", part)
        assert influence("self", run, *flags).code == 0
    merged = influence("merge", *parts, "--top", "6")
    head, *rows = csv.reader(io.StringIO(merged.out))
    expected = list(csv.reader(io.StringIO(whole.out)))
    assert head == expected[0]
    for row, cells in zip(rows, expected[1:], strict=True):
        assert [*row[:2], *row[4:]] == [*cells[:2], *cells[4:]]
        assert list(map(float, row[2:4])) == pytest.approx(list(map(float, cells[2:4])), rel=1e-5)


PARTS = ("1,3,1.0,9.0,,\n2,4,2.0,8.0,,\n", "1,5,0.5,8.5,,\n")


def write_parts(folder) -> list:
    paths = [folder / f"{number}.csv" for number in range(len(PARTS))]
    for path, rows in zip(paths, PARTS, strict=True):
        path.write_text(f"{HEAD}\n{rows}")
    return paths


def test_merge_takes_the_order_of_tables_without_a_record_from_the_flag(influence, tmp_path):
    parts = write_parts(tmp_path)
    merged = influence("merge", *parts, "--sort", "loss", "--quiet")
    assert [row["train"] for row in merged.rows] == ["3", "5", "4"]
    refused(
        influence("merge", *parts, "--quiet", "-o", tmp_path / "out.csv"),
        1,
        "0.csv, line 3: its score belongs before the row above",
        "if self sorted the tables by loss: --sort loss",
    )


def test_merge_refuses_another_order_than_that_of_the_record(run, influence, tmp_path):
    part = tmp_path / "part.csv"
    influence("self", run, "--sort", "loss", "-o", part)
    refused(
        influence("merge", part, "--sort", "score"),
        2,
        "--sort score: self wrote the parts with --sort loss",
        "give --sort loss",
    )
    assert influence("merge", part).out == part.read_text()


def test_merge_refuses_an_order_of_scores(run, influence, tmp_path):
    part = tmp_path / "part.csv"
    influence("score", run, "--queries", "0", "-o", part)
    refused(
        influence("merge", part, "--sort", "loss"), 2, "--sort loss: the tables of score have one"
    )


def test_an_unknown_order_is_refused(run, influence):
    refused(influence("self", run, "--sort", "text"), 2, "--sort text: unknown", "score, loss")


def test_a_loss_that_is_no_number_is_refused(influence, tmp_path):
    part = tmp_path / "part.csv"
    part.write_text(f"{HEAD}\n1,3,1.0,high,,\n")
    refused(influence("merge", part), 1, "part.csv, line 2: loss is 'high', expected a number")
    part.write_text(f"{HEAD}\n1,3,1.0,inf,,\n")
    refused(influence("merge", part), 1, "part.csv, line 2: the score is not finite")


def test_jsonl_holds_the_loss_as_a_number(run, influence):
    row = json.loads(influence("self", run, "--top", "1", "--format", "jsonl").out)
    assert list(row) == HEAD.split(",")
    assert isinstance(row["loss"], float)
