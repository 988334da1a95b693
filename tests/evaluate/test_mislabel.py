"""influence evaluate RUN mislabel against counts of pairs, and against a run trained on the flipped labels."""

import json

import numpy as np
import pytest

from influence_cli.evaluate.detection import find_in_first, place_among_right
from influence_cli.run.replay import Replay
from tests.refusals import refused
from tests.training import DEFINITION, train

TWO_CLASSES = DEFINITION.replace("randint(0, 3,", "randint(0, 2,")
RELABEL = """
def relabel(example, label):
    return example[0], torch.tensor(label)
"""
FLIPPED = """
def train_data():
    x, y = examples(0, 24).tensors
    y = y.clone()
    y[IDS] = 1 - y[IDS]
    return torch.utils.data.TensorDataset(x, y)
"""
RATE = ("--lr", "0.3")


def mislabel(influence, run, *flags):
    return influence("evaluate", run, "mislabel", *RATE, *flags)


def figures_of(result):
    assert result.code == 0, result.err
    return {(row["method"], row["figure"]): float(row["value"]) for row in result.rows}


def count_pairs(scores, wrong):
    """ROC-AUC as the share of (wrong, right) pairs in the right order, equal ones half."""
    right = [score for at, score in enumerate(scores) if at not in wrong]
    pairs = [(scores[at] > r) + (scores[at] == r) / 2 for at in wrong for r in right]
    return float(np.mean(pairs))


def test_the_area_is_the_share_of_pairs_in_order_with_ties():
    random = np.random.default_rng(0)
    is_wrong = np.arange(200) % 7 == 0
    scores = random.integers(0, 9, 200) + 2.0 * is_wrong
    expected = count_pairs(scores, set(np.flatnonzero(is_wrong)))
    assert place_among_right(scores, is_wrong).mean() == pytest.approx(expected, abs=1e-15)


def test_scores_with_known_answers():
    is_wrong = np.arange(100) < 10
    falling = -np.arange(100.0)
    cases = {
        "perfect": (falling, 1.0, [0.5, 1.0, 1.0, 1.0]),
        "reversed": (-falling, 0.0, [0.0] * 4),
        "constant": (falling * 0, 0.5, [0.05, 0.1, 0.2, 0.3]),
        # 5 wrong ones first, then all others equal: 5 of 95 equal ones have a place in the first 10
        "ties": (np.where(np.arange(100) < 5, 1.0, 0.0), 0.75, [0.5, (5 + 5 * 5 / 95) / 10]),
    }
    for scores, area, found in cases.values():
        assert place_among_right(scores, is_wrong).mean() == pytest.approx(area)
        shares = [find_in_first(scores, is_wrong, share).mean() for share in (0.05, 0.1, 0.2, 0.3)]
        assert shares[: len(found)] == pytest.approx(found)


def chance_of(wrong, count, seed):
    """The ROC-AUC of a random order, written out."""
    order = np.random.default_rng(seed).permutation(count)
    right = [index for index in range(count) if index not in wrong]
    return np.mean([[order[one] > order[other] for other in right] for one in wrong])


def test_known_wrong_labels_are_ranked_as_self_ranks_them(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    (tmp_path / "wrong.txt").write_text("3\n17 # seen by hand\n\n4\n")
    result = mislabel(influence, run, "--wrong", tmp_path / "wrong.txt")
    names = ["auc", "found-5%", "found-10%", "found-20%", "found-30%"]
    rows = [(row["method"], row["figure"]) for row in result.rows]
    assert rows == [(method, name) for method in ("tracin", "loss", "random") for name in names]
    assert {(row["n"], row["cost"]) for row in result.rows} == {("3", "0 trainings")}
    area = next(row for row in result.rows if row["method"] == "random")
    assert float(area["value"]) == chance_of([3, 4, 17], 24, seed=0)
    table = influence("self", run, *RATE, "--top", "all").rows
    for method, column in (("tracin", "score"), ("loss", "loss")):
        scores = [0.0] * 24
        for row in table:
            scores[int(row["train"])] = float(row[column])
        figures = figures_of(result)
        assert figures[method, "auc"] == pytest.approx(count_pairs(scores, {3, 4, 17}))
        first = np.argsort(scores)[::-1][:7]  # 30 % of 24
        assert figures[method, "found-30%"] == pytest.approx(len({3, 4, 17} & set(first)) / 3)


def test_by_layer_ranks_by_the_self_influence_of_each_layer(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    (tmp_path / "wrong.txt").write_text("3\n17\n4\n")
    flags = ("--wrong", tmp_path / "wrong.txt")
    rows = mislabel(influence, run, *flags, "--by", "layer").rows
    values = {(row["method"], row["figure"], row["layer"]): row["value"] for row in rows}
    assert [row["layer"] for row in rows if row["figure"] == "auc"] == [
        "0",
        "2",
        "all",
        "all",
        "all",
    ]
    for layer in ("0", "2"):
        alone = mislabel(influence, run, *flags, "--layers", layer).rows[0]
        assert values["tracin", "auc", layer] == alone["value"]
    assert values["tracin", "auc", "all"] == mislabel(influence, run, *flags).rows[0]["value"]


def test_flipped_labels_give_the_figures_of_a_run_trained_on_them(tmp_path, influence, monkeypatch):
    run = train(tmp_path / "run", every=4, definition=TWO_CLASSES + RELABEL)
    result = mislabel(influence, run, "--flip", "0.25", "--seed", "5")
    figures = figures_of(result)
    log = next((run / ".influence" / "evaluate").glob("flipped-*.jsonl"))
    ids = json.loads(log.read_text())["flipped"]
    assert len(ids) == 6
    changed = train(
        tmp_path / "changed", every=4, definition=TWO_CLASSES + FLIPPED.replace("IDS", str(ids))
    )
    (tmp_path / "wrong.txt").write_text("\n".join(map(str, ids)))
    flags = ("--wrong", tmp_path / "wrong.txt", "--seed", "5")
    known = figures_of(mislabel(influence, changed, *flags))
    assert figures == pytest.approx(known, abs=1e-12)
    assert result.rows[0]["cost"].startswith("1 training, ")
    nothing = mislabel(influence, run, "--flip", "0.25", "--seed", "5", "--cache", "none")
    assert figures_of(nothing) == figures
    monkeypatch.setattr(Replay, "advance", None)  # it is not called again
    assert mislabel(influence, run, "--flip", "0.25", "--seed", "5").out == result.out


def test_each_flipped_label_differs_from_the_true_one(tmp_path, influence, monkeypatch):
    run = train(tmp_path / "run", every=12, definition=DEFINITION + RELABEL)
    from influence_cli.evaluate import flipped_labels

    flips = []
    original = flipped_labels.relabel_at_random

    def noted(definition, example, classes, random):
        changed = original(definition, example, classes, random)
        flips.append((int(example[1]), int(changed[1]), classes))
        return changed

    monkeypatch.setattr(flipped_labels, "relabel_at_random", noted)
    assert mislabel(influence, run, "--flip", "0.9").code == 0
    assert len(flips) == 22
    assert all(true != wrong and classes == 3 for true, wrong, classes in flips)
    assert {wrong for _, wrong, _ in flips} == {0, 1, 2}


BAD = {
    "": ("mislabel does not know which labels are wrong", "--wrong FILE and --flip P"),
    "--wrong ids --flip 0.1": ("--wrong and --flip both",),
    "--wrong nowhere.txt": ("--wrong nowhere.txt", "No such file"),
    "--wrong ids --queries 0": ("--queries does not apply to mislabel",),
    "--wrong ids --method dve": ("--method dve does not apply to mislabel", "tracin, grad-dot"),
    "--wrong ids --by query": ("--by query does not apply to mislabel", "expected: layer"),
    "--flip 0": ("--flip 0 changes none of the 24 labels",),
    "--flip 1": ("--flip 1 changes all of the 24 labels",),
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_refused(flags, tmp_path, influence):
    run = train(tmp_path / "run", every=12, definition=DEFINITION + RELABEL)
    (tmp_path / "ids").write_text("1")
    flags_of_case = [str(tmp_path / "ids") if flag == "ids" else flag for flag in flags.split()]
    rate = () if "dve" in flags else RATE
    refused(influence("evaluate", run, "mislabel", *rate, *flags_of_case), 2, *BAD[flags])


BAD_FILES = {
    "1\nx\n": ("line 2: 'x' is no id", "0 to 23"),
    "24\n": ("line 1: '24' is no id",),
    "# none\n": ("names 0 of the 24",),
    "".join(f"{i}\n" for i in range(24)): ("names 24 of the 24",),
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files_of_ids_are_refused(text, tmp_path, influence):
    run = train(tmp_path / "run", every=12)
    (tmp_path / "ids").write_text(text)
    refused(mislabel(influence, run, "--wrong", tmp_path / "ids"), 2, *BAD_FILES[text])


def test_a_definition_that_can_not_change_labels_is_named(tmp_path, influence):
    run = train(tmp_path / "run", every=12)
    refused(
        mislabel(influence, run, "--flip", "0.1"), 1, "definition.py lacks relabel()", "--wrong"
    )
    same = DEFINITION + RELABEL.replace("torch.tensor(label)", "example[1]")
    run = train(tmp_path / "same", every=12, definition=same)
    refused(
        mislabel(influence, run, "--flip", "0.1"), 1, "relabel() in definition.py never changes"
    )
