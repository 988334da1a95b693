"""The baseline `random`: reproducible, independent of how the work is divided, and without a signal."""

import numpy as np

from influence_cli.methods.random import draw_scores
from tests.methods.test_tracin import table


def test_scores_depend_on_seed_query_and_example_alone():
    whole = draw_scores(3, [0, 5, 9], np.arange(100))
    assert np.array_equal(whole[1:2, 40:60], draw_scores(3, [5], np.arange(40, 60)))
    assert not np.any(whole == draw_scores(4, [0, 5, 9], np.arange(100)))


def test_scores_are_uniform_between_minus_one_and_one():
    scores = draw_scores(0, list(range(100)), np.arange(10_000))
    assert -1 <= scores.min() < -0.9999
    assert 0.9999 < scores.max() < 1
    # a million values: the standard error of the mean is 0.58 / 1000, of a row's mean 0.58 / 100
    assert abs(scores.mean()) < 4 * 0.58 / 1000
    assert abs(scores.var() - 1 / 3) < 4 * 0.3 / 1000
    assert np.abs(scores.mean(1)).max() < 5 * 0.58 / 100
    assert np.abs(np.corrcoef(scores[:10])[np.triu_indices(10, 1)]).max() < 5 / 100


def test_a_run_without_cached_gradients_gets_a_full_table(make_run, influence):
    run = make_run()
    result = influence("score", run, "--method", "random", "--top", "all", "--seed", "7")
    assert result.code == 0, result.err
    assert np.array_equal(
        table(result, 6, 20).numpy(), draw_scores(7, list(range(6)), np.arange(20))
    )
    assert not list(run.rglob(".influence/**/*.safetensors"))


def test_shards_and_the_mean_of_queries_have_scores(make_run, influence):
    run = make_run()
    parts = [
        influence("score", run, "--method", "random", "--top", "all", "--shard", f"{n}/2")
        for n in (1, 2)
    ]
    whole = influence("score", run, "--method", "random", "--top", "all")
    assert sum(len(part.rows) for part in parts) == len(whole.rows)
    mean = influence("score", run, "--method", "random", "--sum-queries", "--top", "all")
    assert len(mean.rows) == 20
    assert {row["query"] for row in mean.rows} == {"all"}
