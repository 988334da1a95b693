"""TracIn-WE on the shipped run sample_runs/words, in which a made-up word was planted: the rows it must give are known."""

import json
from itertools import groupby
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "sample_runs" / "words"
PLANTED = json.loads((RUN / "planted.json").read_text())


def pairs(result) -> dict[tuple[str, int], list[dict[str, str]]]:
    """(kind, rank) -> the rows of that pair."""
    assert result.code == 0, result.err
    return {
        pair: list(some)
        for pair, some in groupby(result.rows, lambda row: (row["kind"], int(row["rank"])))
    }


def total(rows: list[dict[str, str]]) -> float:
    return sum(float(row["score"]) for row in rows)


@pytest.fixture
def by_word(influence, tmp_path):
    return pairs(
        influence(
            "score",
            RUN,
            "--method",
            "tracin-we",
            "--by",
            "word",
            "--queries",
            PLANTED["query"],
            "--cache",
            tmp_path / "cache",
        )
    )


def test_planted_texts_come_first_on_the_side_of_their_label(by_word):
    same = {train for train, label in PLANTED["train"].items() if label == PLANTED["label"]}
    for kind, planted in (("proponent", same), ("opponent", PLANTED["train"].keys() - same)):
        first = [by_word[kind, rank][0]["train"] for rank in range(1, len(planted) + 1)]
        assert set(first) == planted
        assert abs(total(by_word[kind, 1])) > 4 * abs(total(by_word[kind, len(planted) + 1])), (
            "with a margin"
        )


def test_the_planted_word_is_on_top_and_makes_nearly_all_of_the_score(by_word):
    for kind in ("proponent", "opponent"):
        rows = by_word[kind, 1]
        assert rows[0]["word"] == PLANTED["word"]
        assert float(rows[0]["score"]) == pytest.approx(total(rows), rel=0.01)
        assert {row["word"] for row in rows} >= {"[CLS]", "[SEP]"}
        assert "[PAD]" not in {row["word"] for row in rows}


def test_word_rows_sum_to_the_score_of_their_pair(influence, tmp_path, by_word):
    whole = pairs(
        influence(
            "score",
            RUN,
            "--method",
            "tracin-we",
            "--queries",
            PLANTED["query"],
            "--cache",
            tmp_path / "cache",
        )
    )
    assert whole.keys() == by_word.keys() and len(whole) == 20
    for pair, (row,) in whole.items():
        assert row["train"] == by_word[pair][0]["train"]
        assert total(by_word[pair]) == pytest.approx(float(row["score"]), rel=1e-5)


def test_texts_are_read_from_token_ids(by_word):
    row = by_word["opponent", 1][0]
    assert (row["query_label"], row["train_label"]) == ("concurrency", "code")
    assert row["query_text"].startswith("zyzzyva zyzzyva zyzzyva call a function after")
