"""Queries whose gradients exceed memory, without a cache: training gradients are computed once, and
scores are those of one pass.
"""

import errno
import signal
import tempfile
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from influence_cli.errors import OutputError
from influence_cli.extraction import query_files
from influence_cli.extraction.extractor import GradientExtractor
from influence_cli.methods import query_passes
from influence_cli.methods.query_passes import PassPlan, plan_passes
from influence_cli.output.ranking import RankingSlice, TopRanking
from tests import reference
from tests.cases import CASES
from tests.conftest import DEFINITION
from tests.forked import run_fork, run_ranks
from tests.methods.test_tracin import OF_CASE, expected, table
from tests.methods.test_tracin_we import DEFINITION as TEXTS
from tests.position_runs import GPT
from tests.refusals import refused

LIVE = ("--cache", "none", "--precision", "float64")
FLAGS = (
    "--by layer",
    "--by checkpoint",
    "--normalize",
    "--normalize --by layer",
    "--group-by label",
    "--group-by label --by checkpoint",
    "--project 8",
    "--project 8 --normalize",
    "--layers 2",
    "--train 3,7,11:13",
    "--queries 0,2,3,5",
    "--method grad-dot",
    "--method grad-cos",
    "--batch-size 3",
    "--top 2",
)
WORD_FLAGS = (
    "",
    "--by word",
    "--by word --top 2",
    "--by checkpoint",
    "--normalize",
    "--top-words 2",
    "--synonyms 2 --by word",
    "--special-tokens drop --pad-id 3",
)


@pytest.fixture
def two_queries(monkeypatch):
    """Passes of at most two queries at two checkpoints, and blocks of four training examples."""
    bytes_at = {"tracin": 43 * 8, "tracin-we": 14 * 6 * 8}
    monkeypatch.setattr(query_passes, "LEAST_BLOCK", 4)

    def limit(method: str = "tracin") -> None:
        monkeypatch.setattr(query_passes, "QUERY_BYTES", 2 * 2 * bytes_at[method])

    limit()
    return limit


def cells(result):
    assert result.code == 0, result.err
    keys = (
        "query",
        "train",
        "group",
        "layer",
        "checkpoint",
        "word",
        "token",
        "query-token",
        "part",
        "value",
    )
    return {tuple(row.get(key, "") for key in keys): float(row["score"]) for row in result.rows}


def check_equal(first, second):
    assert first.keys() == second.keys()
    largest = max(map(abs, first.values()))
    assert max(abs(first[key] - second[key]) for key in first) <= 1e-12 * largest


@pytest.mark.parametrize("flags", FLAGS)
def test_scores_equal_those_of_one_pass(flags, make_run, influence, two_queries, monkeypatch):
    run = make_run()
    command = ("score", run, *LIVE, *(() if "--top" in flags else ("--top", "all")))
    passes, again = (influence(*command, *flags.split()) for _ in range(2))
    assert passes.out == again.out
    assert passes.err == again.err
    assert "take 3 passes" in passes.err or "take 2 passes" in passes.err or "8" in flags
    monkeypatch.undo()
    one = influence(*command, *flags.split())
    assert "passes" not in one.err
    check_equal(cells(passes), cells(one))
    assert [row["query"] for row in passes.rows] == [row["query"] for row in one.rows]


@pytest.mark.parametrize("flags", WORD_FLAGS)
def test_words_equal_those_of_one_pass(flags, make_run, influence, monkeypatch):
    run = make_run(definition=TEXTS)
    command = ("score", run, *LIVE, "--method", "tracin-we", *flags.split())
    command += () if "--top" in flags.split() else ("--top", "all")
    one = influence(*command)
    monkeypatch.setattr(query_passes, "QUERY_BYTES", 1)
    monkeypatch.setattr(query_passes, "LEAST_BLOCK", 4)
    passes, again = influence(*command), influence(*command)
    assert "the 5 queries take 5 passes" in passes.err
    assert passes.out == again.out
    check_equal(cells(passes), cells(one))
    assert [row["query"] for row in passes.rows] == [row["query"] for row in one.rows]


@pytest.mark.parametrize("by", ["token", "query-token"])
@pytest.mark.parametrize("flags", ["", "--top all", "--normalize"])
def test_tokens_equal_those_of_one_pass(by, flags, make_run, influence, monkeypatch):
    run = make_run(definition=GPT)
    command = ("score", run, *LIVE, "--by", by, *flags.split())
    one = influence(*command)
    monkeypatch.setattr(query_passes, "QUERY_BYTES", 1)
    monkeypatch.setattr(query_passes, "LEAST_BLOCK", 4)
    passes = influence(*command)
    assert "the 3 queries take 3 passes" in passes.err
    check_equal(cells(passes), cells(one))


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_formula(name, make_run, influence, monkeypatch):
    monkeypatch.setattr(query_passes, "QUERY_BYTES", 1)
    run = make_run(definition=OF_CASE.format(name=name), model=CASES[name].model)
    result = influence("score", run, "--top", "all", *LIVE)
    assert "take 3 passes" in result.err
    assert reference.relative_error(table(result, 3, 5), expected(run, CASES[name])) < 1e-9


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_of_other_precisions_equal_those_of_one_pass(
    precision, make_run, influence, two_queries, monkeypatch
):
    command = ("score", make_run(), "--top", "all", "--cache", "none", "--precision", precision)
    passes = cells(influence(*command))
    monkeypatch.undo()
    one = cells(influence(*command))
    largest = max(map(abs, one.values()))
    limit = 1e-6 if precision == "float32" else 1e-2
    assert max(abs(one[key] - passes[key]) for key in one) < limit * largest


@pytest.fixture
def captured(monkeypatch) -> Counter:
    """How often the gradients of a (split, step, example) were computed."""
    counts: Counter = Counter()

    def counting(function):
        def call(self, checkpoint, split, columns, ids, *arguments):
            counts.update((split, checkpoint.step, int(id)) for id in ids)
            return function(self, checkpoint, split, columns, ids, *arguments)

        return call

    for name in ("rows_at", "visit_at"):
        monkeypatch.setattr(GradientExtractor, name, counting(getattr(GradientExtractor, name)))
    return counts


@pytest.mark.parametrize("method", ["tracin", "tracin-we"])
@pytest.mark.parametrize("flags", [(), ("--by", "checkpoint"), ("--group-by", "label")])
def test_each_gradient_is_computed_once(flags, method, make_run, influence, two_queries, captured):
    two_queries(method)
    text = TEXTS + "\ndef label(example): return str(int(example[1]))\n"
    run = make_run(definition=text if method == "tracin-we" else DEFINITION)
    result = influence("score", run, "--method", method, *LIVE, *flags)
    assert result.code == 0, result.err
    assert "the gradient of each training example is computed once" in result.err
    train, queries = (24, 5) if method == "tracin-we" else (20, 6)
    assert len(captured) == 2 * (train + queries)
    assert set(captured.values()) == {1}


def test_scores_that_exceed_memory_take_several_rounds(
    make_run, influence, two_queries, captured, monkeypatch
):
    """Scores of a block of the fewest examples, with four queries: two passes a round."""
    run = make_run()
    one = cells(influence("score", run, *LIVE, "--top", "all", "--queries", "0:5"))
    captured.clear()
    monkeypatch.setattr(query_passes, "ROUND_BYTES", 4 * 4 * 8)
    rounds = influence("score", run, *LIVE, "--top", "all", "--queries", "0:5")
    assert "the 5 queries take 3 passes" in rounds.err
    assert "is computed 2 times" in rounds.err
    check_equal(one, cells(rounds))
    assert {count for key, count in captured.items() if key[0] == "train"} == {2}


def test_a_block_and_its_scores_fit_into_memory(monkeypatch):
    def size(example_bytes, queries, train, parts=()):
        sizes = SimpleNamespace(example_bytes=lambda names: example_bytes)
        source = SimpleNamespace(
            settings=SimpleNamespace(storage_dtype=SimpleNamespace(itemsize=4)),
            budget=SimpleNamespace(sizes=lambda split, names: sizes),
        )
        request = SimpleNamespace(columns={"a": None}, parts=parts, train=range(train))
        return query_passes.round_block_size(source, request, queries)

    assert size(16 << 20, 100, 10**6) == 128  # 2 GiB of gradients
    assert size(1, 100_000, 10**6) == 256  # 256 MiB of scores
    assert size(1, 100_000, 10**6, ["x"] * 7) == 32
    assert size(1, 100, 10**5) == 4096  # blocks for several ranks
    assert size(8 << 30, 10, 10**6) == 1


def test_the_plan_of_passes():
    request = SimpleNamespace(
        queries=range(100), checkpoints=(1, 2), parts=[], sum_queries=False, groups=None
    )
    live, cached = SimpleNamespace(cache=None), SimpleNamespace(cache=object())
    plan = plan_passes(live, request, 1 << 25)  # 32 queries of 32 MiB at two checkpoints
    assert [len(ids) for ids in plan.passes] == [32, 32, 32, 4]
    assert [len(ids) for ids in plan.rounds] == [100]
    assert (plan.captures, plan.disk_bytes) == (1, 100 * 2 * (1 << 25))
    plan = plan_passes(cached, request, 1 << 25)
    assert [len(ids) for ids in plan.rounds] == [32, 32, 32, 4]
    assert (plan.captures, plan.disk_bytes) == (1, 0)
    plan = plan_passes(live, request, 1000)
    assert (len(plan.passes), plan.captures, plan.disk_bytes) == (1, 1, 0)
    request.groups = SimpleNamespace(names=["x"] * (1 << 19))  # scores of 64 queries: 256 MiB
    plan = plan_passes(live, request, 1 << 25)
    assert [len(ids) for ids in plan.rounds] == [64, 36]
    assert plan.captures == 2


def test_a_plan_of_one_pass_a_round_is_noted():
    notes: list[str] = []
    source = SimpleNamespace(reporter=SimpleNamespace(note=notes.append))
    query_passes.note_passes(source, PassPlan(range(6), 2, 2, 0, cached=True))
    assert notes == []
    query_passes.note_passes(source, PassPlan(range(6), 2, 2, 0, cached=False))
    assert "with --cache none each pass" in notes[0]


def test_a_slice_of_a_ranking_has_its_queries():
    import numpy as np

    ranking = TopRanking(3, 0, 1)
    ranking.add(np.array([4, 5]), np.array([[1.0, 2.0], [3.0, 2.5], [-1.0, -2.0]]))
    part = RankingSlice(ranking, 1, 2)
    assert part.is_top
    assert [(entry.train, entry.score) for entry in part.entries(0)] == [(4, 3.0)]
    assert [(entry.train, entry.score) for entry in part.entries(1)] == [(5, -2.0)]
    assert not hasattr(RankingSlice, "add")  # blocks are added to the complete ranking


def test_a_score_that_is_not_finite_names_its_query(make_run, influence, two_queries):
    text = DEFINITION.replace(
        'reduction="none")',
        'reduction="none") * (1 + 1e100 * (batch[0][:, 0] == query_data()[4][0][0]).double())',
    ).replace("examples(0, 20)", "examples(1, 6)")
    result = influence("score", make_run(definition=text), *LIVE, "--lr", "1e200")
    assert result.code == 1
    assert "for query number 5 of the request" in result.err
    assert "(query 4)" in result.err


# ---------------------------------------------------------------- temporary files
def leftovers(folder):
    return sorted(path.name for path in folder.glob(".tmp-*"))


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_disk_without_room_is_refused_before_any_file(
    make_run, influence, two_queries, scratch, monkeypatch
):
    monkeypatch.setattr(query_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=4000))
    result = influence("score", make_run(), *LIVE)
    refused(
        result,
        1,
        f"the gradients of the queries do not fit on the disk of {scratch}",
        f"needed: {6 * 2 * 43 * 8:,} bytes; free: 4,000 bytes",
        "TMPDIR=FOLDER",
    )
    assert leftovers(scratch) == []


def test_a_disk_that_fills_up_ends_in_one_message(
    make_run, influence, two_queries, scratch, monkeypatch
):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(query_files, "stream_tensors", full)
    result = influence("score", make_run(), *LIVE)
    refused(result, 1, f"can't be written to {scratch}", "No space left on device", "TMPDIR=FOLDER")
    assert leftovers(scratch) == []


def test_a_folder_that_can_not_be_made_is_named(make_run, influence, two_queries, monkeypatch):
    def denied(parent):
        raise PermissionError(errno.EACCES, "Permission denied", str(parent))

    monkeypatch.setattr(query_files, "ScratchFolder", denied)
    result = influence("score", make_run(), *LIVE)
    refused(result, 1, "need a temporary folder", "Permission denied", "TMPDIR=FOLDER")


def test_files_of_several_processes_need_room_for_all(scratch, monkeypatch):
    monkeypatch.setattr(query_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with ExitStack() as stack, pytest.raises(OutputError, match="needed: 120 bytes"):
        stack.enter_context(query_files.open_query_files(["a"], 1, 60, processes=2))


# the process ends itself while files are there
ENDING = """
import os, signal
from influence_cli.extraction.query_files import QueryFiles
from influence_cli.methods import query_passes
if __name__ == "influence_definition":  # not where a test runs this text to build the run
    query_passes.QUERY_BYTES = 1400
if "ENDS" in os.environ:
    def read(self, checkpoint, numbers):
        assert list(self.folder.iterdir())
        os.kill(os.getpid(), int(os.environ["ENDS"]))
    QueryFiles.read = read
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=str)
def test_an_ended_command_leaves_no_files_after_the_next(number, make_run, scratch, tmp_path):
    run = make_run(definition=DEFINITION + ENDING)

    def use_scratch():
        tempfile.tempdir = str(scratch)

    command = ("score", run, *LIVE)
    ending = {"ENDS": str(int(number))}
    ended = run_fork(*command, place=tmp_path, prepare=use_scratch, environment=ending)
    assert ended.code == (-number if number == signal.SIGKILL else 128 + number), ended.err
    assert len(leftovers(scratch)) == (number == signal.SIGKILL)
    again = run_fork(*command, place=tmp_path, prepare=use_scratch)
    assert again.code == 0, again.err
    assert leftovers(scratch) == []


# ---------------------------------------------------------------- shards and ranks
SMALL = """
import os
from influence_cli.methods import query_passes
if __name__ == "influence_definition":  # as above
    query_passes.QUERY_BYTES, query_passes.LEAST_BLOCK = 1400, 64
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    from tests.conftest import build_run

    text = DEFINITION.replace("examples(0, 20)", "examples(0, 400)") + SMALL
    return build_run(tmp_path_factory.mktemp("many") / "run", text)


@pytest.mark.parametrize("flags", [("--by", "layer"), ("--group-by", "label", "--top", "all")])
def test_ranks_give_the_bytes_of_one_process(flags, many, tmp_path):
    command = ("score", many, *LIVE, *flags)
    alone, ranks = run_fork(*command, place=tmp_path), run_ranks(2, *command, place=tmp_path)
    assert (alone.code, ranks.code, ranks.out) == (0, 0, alone.out), ranks.err


def test_merged_shards_are_the_bytes_of_the_whole(many, tmp_path):
    parts = [tmp_path / "1.csv", tmp_path / "2.csv"]
    for number, path in enumerate(parts, start=1):
        shard = ("--shard", f"{number}/2", "-o", path)
        assert run_fork("score", many, *LIVE, *shard, place=tmp_path).code == 0
    merged, alone = (
        run_fork(*command, place=tmp_path)
        for command in (("merge", *parts), ("score", many, *LIVE))
    )
    assert (merged.code, merged.out) == (alone.code, alone.out) == (0, alone.out)
    assert alone.out.count("\n") > 10
