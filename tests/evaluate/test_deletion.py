"""influence evaluate RUN deletion against training without the top examples written out."""

import json

import numpy as np
import pytest

from influence_cli.errors import UsageProblem
from influence_cli.evaluate.top_deletions import parse_sizes
from tests.evaluate.by_hand import train_by_hand
from tests.refusals import refused
from tests.training import train

FLAGS = ("--method", "tracin", "--lr", "0.3", "--top-k", "5,2")


def deletion(influence, run, *flags):
    return influence("evaluate", run, "deletion", *flags)


def tops_of(influence, run, *method):
    """(query, kind) -> ids by rank, of the table of `score`."""
    tops: dict[tuple[str, str], list[int]] = {}
    for row in influence("score", run, *method, "--top", "20").rows:
        tops.setdefault((row["query"], row["kind"]), []).append(int(row["train"]))
    return tops


def test_the_curve_is_that_of_training_without_the_top_examples_written_out(tmp_path, influence):
    run = train(tmp_path / "run", every=6, rate=0.5)
    result = deletion(influence, run, *FLAGS, "--by", "query")
    assert result.code == 0, result.err
    values = {
        (row["method"], row["figure"], row["query"]): float(row["value"]) for row in result.rows
    }
    complete = train_by_hand(run, np.ones(24, bool))
    for method, flags in {"tracin": FLAGS[:4], "random": ("--method", "random")}.items():
        tops = tops_of(influence, run, *flags)
        for kind in ("proponent", "opponent"):
            for size in (2, 5):
                changes = []
                for query in range(5):
                    members = np.ones(24, bool)
                    members[tops[str(query), kind][:size]] = False
                    changes.append(complete[query] - train_by_hand(run, members)[query])
                name = f"{kind}s-{size}"
                by_query = [values[method, name, str(query)] for query in range(5)]
                assert by_query == pytest.approx(changes, abs=1e-12)
                assert values[method, name, "all"] == pytest.approx(np.mean(changes))
            points = [values[method, f"{kind}s-{size}", "all"] for size in (2, 5)]
            assert values[method, f"{kind}s-auc", "all"] == pytest.approx(np.mean(points))
    assert values["tracin", "proponents-auc", "all"] < 0 < values["tracin", "opponents-auc", "all"]
    assert values["retraining", "noise", "all"] < 1e-12


def test_the_table_counts_each_training_once_and_a_second_command_trains_nothing(
    tmp_path, influence
):
    run = train(tmp_path / "run", every=6)
    result = deletion(influence, run, *FLAGS)
    figures = [f"{kind}s-{point}" for kind in ("proponent", "opponent") for point in (2, 5, "auc")]
    expected = [(method, name) for method in ("tracin", "random") for name in figures]
    rows = [(row["method"], row["figure"]) for row in result.rows]
    assert rows == [*expected, ("retraining", "noise")]
    assert {row["n"] for row in result.rows} == {"5"}
    records = [
        json.loads(line)
        for file in (run / ".influence" / "evaluate").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    distinct = {record["without"] for record in records if "without" in record}
    assert len(records) == 1 + len(distinct)
    counts = {row["method"]: int(row["cost"].split()[0]) for row in result.rows}
    assert counts["retraining"] == 2
    for method, flags in {"tracin": FLAGS[:4], "random": ("--method", "random")}.items():
        tops = tops_of(influence, run, *flags).values()
        sets = {frozenset(ids[:size]) for ids in tops for size in (2, 5)}
        assert counts[method] == len(sets) + 1  # and the complete one
    assert deletion(influence, run, *FLAGS).out == result.out
    assert influence("evaluate", run, "lds", "--subsets", "2", "--method", "random").code == 0
    assert len(list((run / ".influence" / "evaluate").glob("*.jsonl"))) == 1  # they share it


def test_too_few_proponents_are_all_left_out_and_a_note_says_so(tmp_path, influence):
    run = train(tmp_path / "run", every=6)
    result = deletion(influence, run, *FLAGS[:4], "--top-k", "20", "--queries", "1:3")
    assert result.code == 0
    assert "tracin: 2 of 2 queries have fewer than 20 proponents; deletion leaves out" in result.err


def test_shares_are_numbers_of_examples():
    assert parse_sizes("10%, 20,2.5%", 200) == {"2.5%": 5, "10%": 20, "20": 20}
    for text in ("", "x", "0", "200", "0.1%", "5%%", "-3"):
        with pytest.raises(UsageProblem, match="--top-k"):
            parse_sizes(text, 200)


BAD = {
    "--top-k 24": ("--top-k 24 leaves out 24 of the 24", "expected: 1 to 23"),
    "--top-k ten": ("--top-k 'ten' can't be read", "10,20,5%"),
    "--top-k 3 --retrainings 3": ("--retrainings 3: a replay has the recorded order",),
    "--top-k 3 --flip 0.1": ("--flip",),
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_refused(flags, tmp_path, influence):
    run = train(tmp_path / "run", every=12)
    refused(deletion(influence, run, "--lr", "1", *flags.split()), 2, *BAD[flags])
