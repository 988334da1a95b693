"""--aggregate rank|vote against their definitions, written as loops over pairs of examples."""

import json

import numpy as np
import pytest

from influence_cli.errors import OutputError, UsageProblem
from influence_cli.methods import layer_aggregates, query_passes
from influence_cli.methods.layer_aggregates import Aggregate, LayerRanking
from influence_cli.output.ranking import FullRanking, TopRanking
from tests.conftest import DEFINITION
from tests.refusals import refused, replaced
from tests.training import train

RULES = {"rank": Aggregate("rank"), "vote:3": Aggregate("vote", 3)}
# an embedding and two Linear layers: most texts share no word, so their product is exactly 0
TEXTS = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.EmbeddingBag(40, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 40, (number, 3), generator=generator)
    labels = torch.randint(0, 3, (number,), generator=generator)
    if seed == 0:
        words[11], labels[11] = words[4], labels[4]
    return torch.utils.data.TensorDataset(words, labels)

def train_data(): return examples(0, 20)
def query_data(): return examples(1, 6)
def loss(model, batch): return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
def label(example): return "abc"[int(example[1])]
"""


def layer_parts(scores, how):
    """(L, N): what each layer adds to the aggregate of its scores (L, N), from the definition."""
    parts = np.zeros(np.shape(scores))
    for layer, of_layer in enumerate(scores):
        for at, score in enumerate(of_layer):
            lower = sum(other < score for other in of_layer)
            equal = sum(other == score for other in of_layer)
            higher = len(of_layer) - lower - equal
            if how == "rank":
                mean_rank = lower + (equal + 1) / 2
                parts[layer, at] = (mean_rank / len(of_layer) - 0.5) / len(scores)
            else:
                votes = int(how.partition(":")[2] or 10)
                top, bottom = higher + equal <= votes, lower + equal <= votes
                parts[layer, at] = int(top) - int(bottom)
    return parts


def ranked(scores, how, new=lambda queries, parts: FullRanking(queries, parts), blocks=1):
    """The (train, score) of the first query, in their order, from (L, Q, N) scores of layers."""
    ranking = LayerRanking(np.shape(scores)[1], len(scores), RULES[how], False, new)
    for ids in np.array_split(np.arange(np.shape(scores)[2]), blocks):
        ranking.add(ids, scores[:, :, ids].sum(0), scores[:, :, ids])
    return [(entry.train, entry.score) for entry in ranking.entries(0)]


def scores_of(result, by=None):
    """{(query, train): score}, of the part `by`=(column, name) or of all."""
    assert result.code == 0, result.err
    sums: dict = {}
    for row in result.rows:
        if by is None or row[by[0]] == by[1]:
            pair = row["query"], row["train"]
            sums[pair] = sums.get(pair, 0.0) + float(row["score"])
    return sums


def expected_scores(by_layer, how):
    """{(query, train): [score of each layer's part]} from a table of `--by layer --top all`."""
    layers = list(dict.fromkeys(row["layer"] for row in by_layer.rows))
    of_layer = [scores_of(by_layer, ("layer", layer)) for layer in layers]
    pairs = {}
    for query in dict.fromkeys(query for query, _ in of_layer[0]):
        names = [pair for pair in of_layer[0] if pair[0] == query]
        parts = layer_parts([[scores[pair] for pair in names] for scores in of_layer], how)
        pairs |= {pair: parts[:, at] for at, pair in enumerate(names)}
    return pairs


def test_equal_scores_share_their_mean_rank():
    scores = np.array([[[3.0, 1.0, 1.0, 2.0]], [[0.0, -0.0, 0.0, 5.0]]])
    # ranks 4, 1.5, 1.5, 3 and 2, 2, 2, 4; divided by 4, minus 1/2, then the mean of both layers
    assert dict(ranked(scores, "rank")) == {0: 0.25, 1: -0.0625, 2: -0.0625, 3: 0.375}


def test_equal_scores_at_the_border_of_the_top_get_no_vote():
    scores = np.array([[[9.0, 5.0, 5.0, 5.0, 1.0, 1.0, 0.0, 7.0]]])
    # the top 3 would end inside the fives, the bottom 3 ends behind the ones
    assert dict(ranked(scores, "vote:3")) == {0: 1, 1: 0, 2: 0, 3: 0, 4: -1, 5: -1, 6: -1, 7: 1}


@pytest.mark.parametrize("how", RULES)
def test_random_scores_with_ties_give_the_aggregate_of_the_definition(how):
    scores = np.random.default_rng(0).integers(-4, 4, (5, 1, 30)).astype(float)
    expected = layer_parts(scores[:, 0], how).sum(0)
    actual = dict(ranked(scores, how, blocks=7))
    assert max(abs(actual[at] - expected[at]) for at in range(30)) < 1e-15


@pytest.mark.parametrize("how", RULES)
def test_the_scale_of_a_layer_changes_nothing(how):
    scores = np.random.default_rng(1).normal(size=(4, 1, 50))
    scaled = scores * np.array([1e-200, 1.0, 1e30, 7.3])[:, None, None]
    assert ranked(scaled, how) == ranked(scores, how)


def test_the_order_of_layers_and_blocks_changes_nothing():
    scores = np.random.default_rng(2).normal(size=(7, 1, 60))
    expected = ranked(scores, "rank")
    assert ranked(scores[::-1], "rank", blocks=9) == expected


def roc_auc(scores, positives):
    """The probability that a positive is above another one; a tie counts half."""
    others = np.setdiff1d(np.arange(len(scores)), positives)
    pairs = scores[positives][:, None] - scores[others][None]
    return float((pairs > 0).mean() + (pairs == 0).mean() / 2)


def test_noise_of_a_huge_scale_hides_a_perfect_layer_from_the_sum_alone():
    random, positives = np.random.default_rng(3), np.arange(100)
    scores = random.normal(size=(3, 1, 1000)) * np.array([1.0, 1e6, 1e6])[:, None, None]
    scores[0, 0, positives] += 10
    by_sum = roc_auc(scores.sum(0)[0], positives)
    ranks = dict(ranked(scores, "rank"))
    by_rank = roc_auc(np.array([ranks[at] for at in range(1000)]), positives)
    many = Aggregate("vote", 100)
    by_vote = roc_auc(sum(many.points(layer[0]) for layer in scores), positives)
    assert by_sum < 0.6
    assert by_rank > 0.75  # two layers of noise move the mean rank
    assert by_vote > 0.8  # some of them are in the bottom of a layer of noise


FLAGS = (
    "",
    "--normalize",
    "--method grad-cos",
    "--method influence --curvature fisher",
    "--method trak --project 4",
)


@pytest.mark.parametrize("how", ["rank", "vote:3", "vote"])
@pytest.mark.parametrize("flags", FLAGS)
def test_scores_of_a_run_are_the_aggregates_of_its_layers(how, flags, make_run, influence):
    flags = [*flags.split(), "--top", "all", "--precision", "float64"]
    run = make_run(definition=TEXTS)
    parts = expected_scores(influence("score", run, *flags, "--by", "layer"), how)
    actual = scores_of(influence("score", run, *flags, "--aggregate", how))
    assert actual.keys() == parts.keys()
    assert len(parts) == 120
    assert all(abs(actual[pair] - parts[pair].sum()) < 1e-12 for pair in parts)
    assert any(sum(value) for value in parts.values())


def test_the_layers_of_an_aggregate_sum_to_it(make_run, influence):
    run = make_run(definition=TEXTS)
    flags = ["--top", "3", "--aggregate", "rank", "--precision", "float64"]
    alone = influence("score", run, *flags)
    by_layer = influence("score", run, *flags, "--by", "layer")
    parts = expected_scores(
        influence("score", run, "--top", "all", "--by", "layer", "--precision", "float64"), "rank"
    )
    sums = scores_of(by_layer)
    for row in alone.rows:
        assert (float(row["score"]) > 0) == (row["kind"] == "proponent")
        assert abs(sums[row["query"], row["train"]] - float(row["score"])) < 1e-15
    for number, layer in enumerate(("0", "1", "3")):
        for pair, score in scores_of(by_layer, ("layer", layer)).items():
            assert abs(score - parts[pair][number]) < 1e-15


@pytest.mark.parametrize("how", ["rank", "vote:3"])
def test_aggregates_do_not_depend_on_the_batch_size_or_the_cache(how, make_run, influence):
    run = make_run(definition=TEXTS)
    flags = ["--aggregate", how, "--precision", "float64", "--train", "0:11"]  # without its double
    tables = {
        influence("score", run, *flags, "--cache", cache, "--batch-size", size).out
        for cache, size in (("one", "1"), ("seven", "7"), ("none", "3"), ("none", "auto"))
    }
    assert len(tables) == 1
    assert tables != {""}


@pytest.mark.parametrize("flags", [["--top", "2"], ["--top", "all"], ["--group-by", "label"]])
def test_scores_of_layers_on_disk_give_the_same_table(flags, make_run, influence, monkeypatch):
    run = make_run(definition=TEXTS)
    flags = [*flags, "--aggregate", "rank", "--by", "layer"]
    expected = influence("score", run, *flags)
    assert expected.code == 0
    monkeypatch.setattr(layer_aggregates, "SPILL_BYTES", 1)
    assert influence("score", run, *flags).out == expected.out


def test_a_folder_without_room_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(layer_aggregates, "SPILL_BYTES", 1)
    monkeypatch.setattr(layer_aggregates.tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    with pytest.raises(OutputError, match="--aggregate can't write to") as refusal:
        ranked(np.zeros((2, 1, 4)), "rank")
    assert "TMPDIR=FOLDER" in str(refusal.value)


def test_groups_are_ranked_by_their_sums(make_run, influence):
    run = make_run()
    flags = ["--group-by", "label", "--top", "all", "--precision", "float64"]
    parts = expected_scores(influence("score", run, *flags, "--by", "layer"), "rank")
    actual = scores_of(influence("score", run, *flags, "--aggregate", "rank"))
    assert len(actual) == 18
    assert all(abs(actual[pair] - parts[pair].sum()) < 1e-15 for pair in parts)


def test_queries_in_several_passes_have_the_scores_of_one_pass(make_run, influence, monkeypatch):
    run = make_run()
    flags = ["--cache", "none", "--precision", "float64", "--aggregate", "vote:3"]
    expected = influence("score", run, *flags)
    monkeypatch.setattr(query_passes, "QUERY_BYTES", 2 * 2 * 43 * 8)  # two queries a pass
    result = influence("score", run, *flags)
    assert "3 passes" in result.err
    assert result.out == expected.out


def test_methods_that_follow_training_aggregate_their_layers(tmp_path, influence):
    train(tmp_path / "run", steps=4)
    flags = ["--method", "dve", "--top", "all"]
    run = tmp_path / "run"
    parts = expected_scores(influence("score", run, *flags, "--by", "layer"), "rank")
    actual = scores_of(influence("score", run, *flags, "--aggregate", "rank"))
    assert all(abs(actual[pair] - parts[pair].sum()) < 1e-12 for pair in parts)
    assert len(actual) == 5 * 24


@pytest.mark.parametrize("how", ["rank", "vote:3"])
def test_self_aggregates_the_norms_of_layers(how, make_run, influence):
    run = make_run()
    flags = ["--top", "all", "--precision", "float64"]
    of_layer = [
        {int(row["train"]): float(row["score"]) for row in result.rows}
        for result in (influence("self", run, *flags, "--layers", layer) for layer in "02")
    ]
    expected = layer_parts([[layer[at] for at in range(20)] for layer in of_layer], how).sum(0)
    result = influence("self", run, *flags, "--aggregate", how)
    scores = [(float(row["score"]), int(row["train"])) for row in result.rows]
    assert all(abs(score - expected[train]) < 1e-15 for score, train in scores)
    assert scores == sorted(scores, key=lambda pair: (-pair[0], pair[1]))
    plain = influence("self", run, *flags)
    assert sorted(row["loss"] for row in plain.rows) == sorted(row["loss"] for row in result.rows)


def test_self_sorted_by_loss_shows_the_aggregate_beside_it(make_run, influence):
    run = make_run()
    by_score = influence("self", run, "--top", "all", "--aggregate", "rank")
    by_loss = influence("self", run, "--top", "all", "--aggregate", "rank", "--sort", "loss")
    scores = {row["train"]: row["score"] for row in by_score.rows}
    assert scores == {row["train"]: row["score"] for row in by_loss.rows}
    losses = [float(row["loss"]) for row in by_loss.rows]
    assert losses == sorted(losses, reverse=True)


def test_sum_is_the_default(make_run, influence):
    run = make_run()
    for command in ("score", "self"):
        plain = influence(command, run)
        assert plain.code == 0
        assert influence(command, run, "--aggregate", "sum").out == plain.out


def test_the_record_of_a_table_names_the_aggregate(make_run, influence, tmp_path):
    run = make_run()
    for command in ("score", "self"):
        result = influence(
            command, run, "--aggregate", "vote:3", "--format", "jsonl", "-o", tmp_path / "t.jsonl"
        )
        assert result.code == 0, result.err
        record = json.loads((tmp_path / "t.jsonl.meta.json").read_text())
        assert record["request"]["aggregate"] == "vote:3"


@pytest.mark.parametrize("value", ["mean", "vote:", "vote:0", "vote:-1", "rank:3", ""])
def test_other_values_are_refused(value, make_run, influence):
    for command in ("score", "self"):
        result = influence(command, make_run(command + value), "--aggregate", value)
        refused(result, 2, f"--aggregate {value}: unknown", "vote:K with a number K from 1")


def test_shards_are_refused_because_they_see_some_examples_only(make_run, influence):
    for command in ("score", "self"):
        result = influence(command, make_run(command), "--aggregate", "rank", "--shard", "1/2")
        refused(result, 2, "orders all training examples, --shard scores some of them", "torchrun")


@pytest.mark.parametrize("method", ["repsim", "random", "tracin-we"])
def test_methods_without_layers_are_refused(method, make_run, influence):
    result = influence("score", make_run(), "--method", method, "--aggregate", "vote")
    refused(result, 2, f"--aggregate vote:10: the scores of {method} have no parts by layer",
            "methods that have them: tracin, grad-dot")  # fmt: skip


def test_other_parts_are_refused(make_run, influence):
    result = influence("score", make_run(), "--aggregate", "rank", "--by", "checkpoint")
    refused(result, 2, "--by checkpoint splits their sums", "expected: --by layer, or none")


def test_a_top_of_all_examples_is_refused(make_run, influence):
    for command in ("score", "self"):
        result = influence(command, make_run(command), "--aggregate", "vote:20")
        refused(result, 2, "all of 20 training examples", "k below 20", "vote:5")
    with pytest.raises(UsageProblem, match="top 10 and in the bottom 10"):
        Aggregate("vote").check_examples(10)


def test_a_score_that_is_not_finite_is_refused(make_run, influence):
    text = replaced(DEFINITION, ('reduction="none")', 'reduction="none") * 1e100'))
    flags = ["--aggregate", "rank", "--precision", "float64", "--lr", "1e200"]
    result = influence("score", make_run(definition=text), *flags)
    refused(result, 1, "the score of training example 0 is", "its largest part")


def test_top_keeps_the_highest_and_the_lowest(make_run):
    scores = np.random.default_rng(4).normal(size=(2, 1, 40))
    every = dict(ranked(scores, "rank"))
    top = ranked(scores, "rank", lambda queries, parts: TopRanking(queries, parts, 4))
    falling = sorted(every, key=lambda at: (-every[at], at))
    rising = sorted(every, key=lambda at: (every[at], at))
    assert [at for at, _ in top] == falling[:4] + rising[:4]
