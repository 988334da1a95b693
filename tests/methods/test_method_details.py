"""Single functions of the methods, and notes with the numbers that they must hold."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from faults.numeric_runs import NumericRun, Reference, build_numeric_run, draw_batches
from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.gradients.forms import Dense
from influence_cli.methods import inner_products
from influence_cli.methods.products import extreme_norms, inverse_of_norms
from influence_cli.methods.query_passes import plan_passes
from influence_cli.methods.random import draw_scores
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint
from influence_cli.methods.reverse.replayed_steps import ReplayedSteps
from influence_cli.methods.reverse.resume import find_chain
from influence_cli.methods.reverse.saved_file import check_values
from influence_cli.methods.reverse.stability import state_norms, top_eigenvalue
from influence_cli.methods.table import METHODS
from influence_cli.methods.word_selection import WordSelector
from tests.refusals import refused
from tests.training import train


def test_the_drift_is_the_cosine_of_gradients_at_neighbouring_checkpoints(tmp_path, influence):
    numeric = NumericRun(exponent=1)  # a rate of 0.03 with losses times 10: the same training
    run = build_numeric_run(numeric, tmp_path / "run")
    reference, batches = Reference(numeric, run), draw_batches(numeric)
    cosines = []
    for first, after in ((0, 2), (2, 5)):
        one, two = (reference.gradients(step, "train") for step in (first, after))
        ids = sorted({example for step in batches[first:after] for example in step})
        positions = torch.linspace(0, len(ids) - 1, min(8, len(ids))).round().int().unique()
        some = [ids[position] for position in positions.tolist()]
        cosines.append(torch.cosine_similarity(one[some], two[some]))
    for step in (1, 3, 4):
        (run / "checkpoints" / f"step-{step:06d}.safetensors").unlink()
    err = influence("score", run, "--method", "dve").err
    median, least = map(
        float, re.search(r"median cosine of (\S+), the smallest (\S+) ", err).groups()
    )
    both = torch.cat(cosines)
    assert least == pytest.approx(float(both.min()), abs=0.006)
    assert median == pytest.approx(float(both.quantile(0.5)), abs=0.006)


@pytest.mark.parametrize(
    ("clip", "layers", "noted"), [(0.5, True, True), (0.5, False, False), (1.0, True, False)]
)
def test_a_note_says_where_clipping_saw_more_parameters(clip, layers, noted, tmp_path, influence):
    run = train(tmp_path / "run", steps=4, clip=lambda norm: clip)
    flags = ("--layers", "0.*") if layers else ()
    result = influence("score", run, "--method", "dve", *flags)
    assert result.code == 0, result.err
    assert ("training clipped gradients by their norm over all parameters" in result.err) == noted


def test_a_replay_on_one_thread_is_the_training_bit_for_bit(tmp_path, influence):
    run = train(tmp_path / "run", steps=4, every=2)
    err = influence("score", run, "--method", "dve", "--replay").err
    assert "it reproduced 2 saved checkpoints bit for bit" in err
    rounded = build_numeric_run(NumericRun(), tmp_path / "rounded")  # float32 of a float64 training
    err = influence("score", rounded, "--method", "dve", "--replay").err
    assert "the largest relative distance is" in err
    assert "bit for bit" not in err


@pytest.mark.parametrize("by", ["checkpoint", "layer"])
def test_cosines_of_features_have_no_parts(by, make_run, influence):
    refused(influence("score", make_run(), "--method", "repsim", "--by", by), 2, "--by")


@pytest.mark.parametrize(
    ("query_bytes", "parts", "sum_queries", "size"),
    [
        (1 << 20, 0, False, 1024),  # 2 GiB of gradients at two checkpoints
        (1, 0, False, 4096),  # 128 MiB of scores of 4,096 examples
        (1, 3, False, 1024),  # with three parts each
        (1 << 40, 0, False, 1),
        (1, 0, True, 9000),
    ],
)
def test_a_pass_has_the_queries_that_fit_into_memory(query_bytes, parts, sum_queries, size):
    request = SimpleNamespace(
        queries=range(9000),
        checkpoints=(1, 2),
        parts=["x"] * parts,
        sum_queries=sum_queries,
        groups=None,
    )
    passes = plan_passes(SimpleNamespace(cache=object()), request, query_bytes).passes
    assert {len(ids) for ids in passes[:-1]} <= {size}
    assert len(passes[0]) == size
    assert [query for ids in passes for query in ids] == list(range(9000))


@pytest.mark.parametrize(
    ("tiles", "adjoints", "chain"),
    [
        ({(3, 5)}, {3}, [(3, 5)]),
        ({(3, 3), (3, 5)}, {3}, [(3, 5)]),  # an empty tile leads nowhere
        ({(3, 5), (1, 3), (2, 3)}, {1}, [(3, 5), (1, 3)]),
        ({(3, 4)}, {3}, None),  # a gap
        ({(3, 5)}, set(), None),
        ({(3, 5)}, {5}, []),
    ],
)
def test_saved_effects_are_a_chain_of_tiles(tiles, adjoints, chain):
    assert find_chain(tiles, adjoints, 5, range(5)) == chain


@pytest.mark.parametrize(
    ("value", "says"), [([[1.0, 2.0]], "has the shape"), ([[1.0], [float("nan")]], "not finite")]
)
def test_saved_values_have_their_shape_and_are_finite(value, says):
    check_values("x", torch.ones(2, 1), (2, 1))
    with pytest.raises(ValueError, match=says):
        check_values("x", torch.tensor(value), (2, 1))


def test_all_other_tokens_can_be_synonyms():
    selector = object.__new__(WordSelector)
    selector.options = SimpleNamespace(synonyms=9)
    unit = torch.nn.functional.normalize(
        torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    )
    selector.__dict__ |= {"_unit_vectors": unit, "_countable": torch.ones(4, dtype=torch.bool)}
    near, likeness = selector._nearest(torch.tensor([2, 0]))
    assert [sorted(row) for row in near.tolist()] == [[0, 1, 2, 3]] * 2
    assert near[:, 0].tolist() == [2, 0]
    assert torch.allclose(likeness, torch.einsum("ud,ukd->uk", unit[[2, 0]], unit[near]))


@pytest.mark.parametrize(
    ("distances", "says"),
    [
        (
            {4: 2e-8, 8: 1e-8},
            "2 saved checkpoints; the largest relative distance is 2e-08 (step 4)",
        ),
        (
            {4: 1e-8, 8: 2e-8},
            "2 saved checkpoints; the largest relative distance is 2e-08 (step 8)",
        ),
        ({4: 0.05}, "1 saved checkpoint; the largest relative distance is 0.05 (step 4). Rounding"),
        ({4: 0.0}, "1 saved checkpoint bit for bit"),
    ],
)
def test_the_agreement_of_a_replay_is_its_largest_distance(distances, says):
    replayed = object.__new__(ReplayedSteps)
    replayed.distances = distances
    notes: list[str] = []
    replayed.report_agreement(SimpleNamespace(note=notes.append))
    assert says in notes[0]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_largest_eigenvalue_does_not_depend_on_its_size(scale):
    rows = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = scale * rows @ rows.T
    expected = float(torch.linalg.eigvalsh(matrix)[-1])
    assert top_eigenvalue(matrix) == pytest.approx(expected, rel=1e-4)
    assert top_eigenvalue(torch.zeros(3, 3)) == 0


def test_random_scores_are_those_of_splitmix64():
    mask = (1 << 64) - 1

    def mix(value):  # Steele et al. 2014, in whole numbers
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    scores = draw_scores(3, [-1, 4], np.array([0, 1, 9]))
    expected = [
        [(mix(mix(mix(3) ^ (query & mask)) ^ train) >> 11) * 2.0**-52 - 1 for train in (0, 1, 9)]
        for query in (-1, 4)
    ]
    assert scores.tolist() == expected


@pytest.mark.parametrize(
    ("name", "checkpoints", "weighted", "normalized", "parts", "share"),
    [
        ("tracin", "all", True, False, ("checkpoint", "layer", "token", "query-token"), "scores"),
        ("tracin-we", "all", True, False, ("checkpoint", "word"), "scores"),
        (
            "grad-dot",
            "one",
            False,
            False,
            ("checkpoint", "layer", "token", "query-token"),
            "scores",
        ),
        (
            "grad-cos",
            "one",
            False,
            True,
            ("checkpoint", "layer", "token", "query-token"),
            "scores",
        ),  # a cosine already
        ("dve", "all", False, False, ("step", "checkpoint", "layer"), "gradients"),
        ("unroll", "all", False, False, ("step", "checkpoint", "layer"), "gradients"),
        ("repsim", "one", False, True, (), "scores"),
        ("random", "one", False, False, (), "scores"),
    ],
)
def test_methods_declare_what_their_scores_are(
    name, checkpoints, weighted, normalized, parts, share
):
    method = METHODS[name]
    assert (method.checkpoints, method.weighted, method.normalized) == (
        checkpoints, weighted, normalized,
    )  # fmt: skip
    assert (method.parts, method.ranks_share) == (parts, share)


def test_the_size_of_an_adjoint_counts_momentum_but_not_the_moments_of_adam():
    three, four, twelve = ({"a": torch.tensor([[float(value)]])} for value in (3, 4, 12))
    assert state_norms(Adjoint(three, {})).tolist() == [3.0]
    assert state_norms(Adjoint(three, four)).tolist() == [5.0]
    assert state_norms(Adjoint(three, four, twelve)).tolist() == [3.0]  # they are of another scale


def test_a_norm_of_0_has_the_inverse_0_and_an_infinite_one_none():
    inverse = inverse_of_norms(torch.tensor([0.0, 2.0, float("inf")]))
    assert inverse[:2].tolist() == [0.0, 0.5]
    assert inverse[2].isnan()  # no score of it may look right


def test_norms_past_the_range_of_float32_products_are_extreme():
    norms = torch.tensor([0.0, 1e-25, 1e-23, 1.0, 1e23, 1e25], dtype=torch.float64)
    assert extreme_norms(norms.square()).tolist() == [False, True, False, False, False, True]


def test_word_scores_of_one_checkpoint_are_those_of_its_embedding(tmp_path, influence):
    run = build_numeric_run(NumericRun("words"), tmp_path / "run")
    flags = ("--lr", "0.1", "--steps", "5", "--top", "all")
    words = influence("score", run, "--method", "tracin-we", *flags)
    embedding = influence("score", run, "--layers", "0.weight", *flags)
    assert words.code == embedding.code == 0, words.err
    one, two = (
        {(row["query"], row["train"]): float(row["score"]) for row in result.rows}
        for result in (words, embedding)
    )
    assert one == pytest.approx(two, rel=1e-5, abs=1e-9)


def test_a_unit_of_wide_rows_is_multiplied_in_parts_in_order(monkeypatch):
    monkeypatch.setattr(inner_products, "SMALL_PART", 2)
    monkeypatch.setattr(inner_products, "WIDE_ROW_BYTES", 11)
    values, ids, zeros = torch.arange(15.0).view(5, 3), np.arange(5), torch.zeros(5)
    unit = GradientRows(ids, zeros, zeros, {"a": zeros}, {"a": Dense((3,), values)})
    parts = list(inner_products.parts_of_unit(unit, {("a",): (1.0, 1)}, False, torch.device("cpu")))
    assert [at for at, _ in parts] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for at, part in parts:
        assert torch.equal(part.forms["a"].dense().values, values[at])
