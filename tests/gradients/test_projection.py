"""Projections against their definition as explicit matrices, and against what theory says of their
inner products.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_cli.gradients import tensor_sketch
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.deferred_forms import ConvolutionForm, TiedForm
from influence_cli.gradients.form_ops import merged
from influence_cli.gradients.forms import Dense, Factors, Form
from influence_cli.gradients.projection import Projection, matrix_shape
from influence_cli.gradients.projection_kinds import KINDS
from influence_cli.gradients.projection_map import FactoredMap
from influence_cli.gradients.random_tables import Tables
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings
from influence_cli.gradients.tensor_sketch import CountSketch
from tests import reference
from tests.cases import CASES, Case, tokens
from tests.cases import numbers as numbers_of

CPU = torch.device("cpu")


def explicit(kind: str, numbers: int, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The K x D matrix of a projection, entry by entry from its random numbers."""
    o, i = matrix_shape(shape)
    tables = Tables(seed, name, o, i, CPU, torch.float64)
    if kind == "sparse":
        places, signs = tables.order("both", o * i) % numbers, tables.signs("both", o * i)
        out = torch.zeros(numbers, o * i, dtype=torch.float64)
        for j in range(o * i):
            out[places[j], j] = signs[j]
        return out
    out = torch.zeros(numbers, o, i, dtype=torch.float64)
    if kind == "tensor-sketch":
        left, right = (
            CountSketch(tables, "left", o, numbers),
            CountSketch(tables, "right", i, numbers),
        )
        for a in range(o):
            for b in range(i):
                out[(left.places[a] + right.places[b]) % numbers, a, b] = (
                    left.signs[a] * right.signs[b]
                )
    elif kind == "khatri-rao":
        left, right = tables.signs("left", o, numbers), tables.signs("right", numbers, i)
        for j in range(numbers):
            out[j] = torch.outer(left[:, j], right[j]) / math.sqrt(numbers)
    else:
        root = math.isqrt(numbers)
        left, right = tables.normal("left", o, root), tables.normal("right", root, i)
        for j in range(root):
            for k in range(root):
                out[j * root + k] = torch.outer(left[:, j], right[k]) / root
    return out.flatten(1)


def by_matrix(
    grads: dict[str, Tensor], kind: str, numbers: int, seed: int = 0
) -> dict[str, Tensor]:
    """Of (N, *shape) gradients what a projection keeps: (N, K), and parameters of at most K numbers
    as they are.
    """
    flat = {name: value.reshape(len(value), -1) for name, value in grads.items()}
    return {
        name: value
        if value.shape[1] <= numbers
        else value @ explicit(kind, numbers, seed, name, tuple(grads[name].shape[1:])).T
        for name, value in flat.items()
    }


def forms(dtype: torch.dtype = torch.float64) -> dict[str, Form]:
    """Gradients of five examples in every form that a projection meets: factors cheaper than dense
    and not, words, tied, a convolution.
    """
    torch.manual_seed(0)
    made = {
        name: torch.randn(*shape, dtype=dtype)
        for name, shape in {"l": (5, 3, 23), "r": (5, 3, 31), "long": (5, 40, 9)}.items()
    }
    factors = Factors((23, 31), made["l"], made["r"])
    many = Factors((9, 11), made["long"], torch.randn(5, 40, 11, dtype=dtype))
    rows = EmbeddingRows(
        (23, 31),
        torch.tensor([1, 4, 4, 0, 22, 7]),
        torch.randn(6, 31, dtype=dtype),
        torch.tensor([0, 2, 3, 3, 5, 6]),
    )
    conv = ConvolutionForm(
        (9, 20),
        torch.randn(10, 9, dtype=dtype),
        torch.randn(10, 20, dtype=dtype),
        2,
        lambda x, g: (x[:, :, None] * g[:, None]).flatten(1),
        lambda x, g: iter([(slice(0, 9), x, g)]),
    )
    return {
        "factors": factors,
        "factors of many positions": many,
        "dense": Dense((6, 5, 3), torch.randn(5, 90, dtype=dtype)),
        "vector": Dense((77,), torch.randn(5, 77, dtype=dtype)),
        "rows": rows,
        "postings": Postings.of(rows),
        "tied": merged(factors, rows),
        "factors of one column": Factors(
            (70, 1), torch.randn(5, 1, 70, dtype=dtype), torch.randn(5, 1, 1, dtype=dtype)
        ),
        "factors of one row": Factors(
            (1, 70), torch.randn(5, 2, 1, dtype=dtype), torch.randn(5, 2, 70, dtype=dtype)
        ),
        "rows of one number": EmbeddingRows(
            (90, 1), rows.ids, torch.randn(6, 1, dtype=dtype), rows.offsets
        ),
        "a table of positions": Dense((1, 12, 8), torch.randn(5, 96, dtype=dtype)),
        "convolution": conv,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", forms())
def test_every_form_is_multiplied_by_the_matrix_of_its_definition(kind, form):
    gradients = forms()[form]
    for numbers in (16, 49):
        norms, actual = Projection(kind, numbers, 3)("layer.weight", gradients)
        dense = gradients.dense().values
        expected = dense @ explicit(kind, numbers, 3, "layer.weight", gradients.shape).T
        torch.testing.assert_close(actual.dense().values, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(norms, dense.square().sum(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adding", [0, 1e9], ids=["by matrix", "in the frequency domain"])
def test_both_ways_of_a_tensor_sketch_are_its_matrix(adding, monkeypatch):
    monkeypatch.setattr(tensor_sketch, "ADDING", adding)
    monkeypatch.setattr(tensor_sketch, "PART_BYTES", 5000)  # some examples at a time
    for name in ("factors", "tied"):
        gradients = forms()[name]
        for numbers in (8, 25, 27, 400):
            actual = Projection("tensor-sketch", numbers, 1)("w", gradients)[1].dense().values
            expected = (
                gradients.dense().values
                @ explicit("tensor-sketch", numbers, 1, "w", gradients.shape).T
            )
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_what_is_tied_is_neither_lost_nor_formed():
    both = forms()["tied"]
    assert isinstance(both, TiedForm)
    for more in (forms()["rows"], forms()["factors"]):
        expected = both.dense().values + more.dense().values
        for sum_ in (merged(both, more), merged(more, both)):
            assert isinstance(sum_, TiedForm)
            torch.testing.assert_close(sum_.dense().values, expected, rtol=1e-12, atol=1e-12)


class Wordy(nn.Module):
    """Few positions, many words: embedding and output weight are one parameter, whose gradient is
    far larger than its factors and rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 60, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(ids))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_model_keeps_the_products_of_its_matrices(kind):
    """Grouped convolutions (their places are those of all output channels), tied weights, words,
    many positions.
    """
    names = (
        "batchnorm-eval",
        "groupnorm-conv1d",
        "tied",
        "padded-texts",
        "attention",
        "reused",
        "embedding",
    )
    for name, case in {name: CASES[name] for name in names}.items():
        numbers = 16
        result, expected, capture = kept(case, Projection(kind, numbers, 5))
        assert capture.hooked, name
        for parameter, value in by_matrix(expected, kind, numbers, 5).items():
            torch.testing.assert_close(
                result.forms[parameter].dense().values,
                value,
                rtol=1e-9,
                atol=1e-11 + 1e-11 * float(value.norm()),
            )
            torch.testing.assert_close(
                result.sqnorms[parameter],
                expected[parameter].flatten(1).square().sum(1),
                rtol=1e-9,
                atol=1e-15,
            )


def test_groups_of_a_convolution_have_places_of_their_own():
    """Were both groups folded alike, channels 0 and 2 of a weight of two groups would always meet
    with one sign.
    """
    case = Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten()), numbers_of(4, 5, 5)
    )
    result, expected, _ = kept(case, Projection("tensor-sketch", 20))
    weight = expected["0.weight"]  # (N, 6, 2, 3, 3)
    rows = weight.flatten(2)
    tables = Tables(0, "0.weight", 6, 18, CPU, torch.float64)
    left, right = CountSketch(tables, "left", 6, 20), CountSketch(tables, "right", 18, 20)
    assert len(set(left.places.tolist())) == 6
    wanted = torch.zeros(len(rows), 20, dtype=torch.float64)
    for channel in range(6):
        for k in range(18):
            at = int(left.places[channel] + right.places[k]) % 20
            wanted[:, at] += left.signs[channel] * right.signs[k] * rows[:, channel, k]
    torch.testing.assert_close(
        result.forms["0.weight"].dense().values, wanted, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sparse"])
def test_a_tied_weight_is_projected_without_its_dense_gradients(kind, monkeypatch):
    case = Case(Wordy, tokens(3, vocabulary=60))
    formed = []

    def refuse(form: Form) -> None:
        formed.append(form.shape)
        raise AssertionError(f"a dense gradient of {form.shape}")

    def forbid() -> None:
        for way in ("dense", "parts"):
            for form in (Factors, TiedForm):
                monkeypatch.setattr(form, way, refuse)

    result, expected, capture = kept(case, Projection(kind, 49), forbid)
    assert "embedding.weight" in capture.hooked
    assert formed == []
    wanted = by_matrix(expected, kind, 49)["embedding.weight"]
    torch.testing.assert_close(
        result.forms["embedding.weight"].dense().values, wanted, rtol=1e-9, atol=1e-12
    )
    scores = result.forms["embedding.weight"].dot(result.forms["embedding.weight"])
    torch.testing.assert_close(scores, wanted @ wanted.T, rtol=1e-9, atol=1e-12)


def kept(case: Case, projection: Projection, before: Callable[[], None] = lambda: None):
    """(result, reference gradients, capture): what a capture with a projection keeps. `before`:
    called between its probe and its work.
    """
    torch.manual_seed(0)
    model = case.model().double().eval()
    items = case.examples()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    embeddings = [
        f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    capture = Capture(model, case.loss, names, embeddings, projection=projection)
    capture.probe(case.collate(items[:2]), [case.collate([item]) for item in items[:2]])
    before()
    result = capture(case.collate(items), lambda i: case.collate([items[i]]), len(items))
    return (
        result,
        reference.gradients(model, case.loss, [case.collate([item]) for item in items]),
        capture,
    )


def test_small_parameters_are_kept_exactly():
    bias = Dense((7,), torch.randn(5, 7))
    _, kept = Projection("tensor-sketch", 8)("bias", bias)
    assert torch.equal(kept.dense().values, bias.values)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_right_on_average_and_spread_as_theory_allows(kind):
    """Over 400 seeds: the mean within five standard errors, the spread within the bound that
    `check` uses.
    """
    torch.manual_seed(1)
    x, y = (
        Factors(
            (40, 30),
            torch.randn(6, 2, 40, dtype=torch.float64),
            torch.randn(6, 2, 30, dtype=torch.float64),
        )
        for _ in range(2)
    )
    y = Factors((40, 30), y.left + 0.5 * x.left, y.right + 0.5 * x.right)
    exact = x.dot(y)
    drawn = []
    for seed in range(400):
        projection = Projection(kind, 64, seed)
        first, second = (projection("w", form)[1].dense().values for form in (x, y))
        drawn.append(first @ second.T)
    actual = torch.stack(drawn)
    off, spread = actual.mean(0) - exact, actual.std(0)
    assert (off.abs() < 5 * spread / 20).all()
    assert not torch.allclose(actual[0], exact, rtol=1e-3)  # it is a projection, not the identity
    bound = Projection(kind, 64).spread((40, 30)) * torch.outer(
        x.sqnorm().sqrt(), y.sqnorm().sqrt()
    )
    assert (spread < bound).all()


def test_tables_differ_between_parameters_sides_and_seeds_and_stay_for_ever():
    def bits(seed: int, name: str, side: str) -> list[int]:
        return Tables(seed, name, 4, 4, CPU, torch.float64).bits(side, 4).tolist()

    seen = [
        bits(seed, name, side)
        for seed in (0, 1)
        for name in ("a", "b")
        for side in ("left", "right")
    ]
    assert len({tuple(values) for values in seen}) == 8
    assert bits(0, "a", "left") == [
        2230144778291951675,
        12209963742548473739,
        14194924358885615696,
        10704857455549465598,
    ]


def test_places_are_even_and_without_collisions_where_there_is_room():
    tables = Tables(0, "a", 1, 1, CPU, torch.float64)
    counts = np.bincount(CountSketch(tables, "left", 104, 16).places.numpy(), minlength=16)
    assert sorted(counts) == [6] * 8 + [7] * 8
    assert len(set(CountSketch(tables, "left", 12, 16).places.tolist())) == 12


def test_any_two_products_meet_with_a_chance_of_one_in_k():
    """Over 300 seeds, of fixed pairs of entries: the same row, column, diagonal and antidiagonal,
    and neither; near and far apart.
    """
    pairs = [
        ((3, 5), other)
        for other in ((3, 6), (4, 5), (4, 6), (4, 4), (2, 7), (3, 37), (19, 5), (35, 37), (20, 20))
    ]
    K = 16
    for o, i in ((40, 40), (10, 40), (40, 10), (10, 10)):
        met = dict.fromkeys(pairs, 0)
        for seed in range(300):
            tables = Tables(seed, "a", o, i, CPU, torch.float64)
            left, right = (
                CountSketch(tables, *side).places for side in (("left", o, K), ("right", i, K))
            )
            for pair in pairs:
                (a, b), (c, d) = pair
                if max(a, c) < o and max(b, d) < i:
                    met[pair] += int((left[a] + right[b] - left[c] - right[d]) % K == 0)
        assert max(met.values()) < 300 / K + 5 * math.sqrt(300 / K), met


def test_larger_projections_are_better():
    torch.manual_seed(2)
    x, y = (Factors((12, 20), torch.randn(40, 3, 12), torch.randn(40, 3, 20)) for _ in range(2))
    errors = []
    for numbers in (16, 64, 128):
        off = []
        for seed in range(20):
            first, second = (
                Projection("tensor-sketch", numbers, seed)("w", form)[1].dense().values
                for form in (x, y)
            )
            off.append((first @ second.T - x.dot(y)).square().mean())
        errors.append(float(torch.stack(off).mean()))
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.7 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype):
    for kind in KINDS:
        for name, form in forms(torch.float32).items():
            norms, actual = Projection(kind, 16)("w", form.to(CPU, dtype))
            _, expected = Projection(kind, 16)("w", form.to(CPU, dtype).to(CPU, torch.float64))
            scale = norms.max().sqrt()
            assert float((actual.dense().values - expected.dense().values).abs().max() / scale) < (
                1e-5 if dtype == torch.float32 else 1e-4
            ), (kind, name)


@pytest.mark.parametrize("kind", ["tensor-sketch", "khatri-rao", "kronecker"])
@pytest.mark.parametrize("positions", [1, 12])
def test_projections_stay_on_their_device(kind, positions):
    """On the meta device, which has no numbers: nothing is asked of them, and nothing lies on
    another device.
    """
    meta = torch.device("meta")
    form = Factors(
        (80, 70),
        torch.empty(6, positions, 80, device=meta),
        torch.empty(6, positions, 70, device=meta),
    )
    sketch = KINDS[kind](Tables(0, "w", 80, 70, meta, torch.float32), 64)
    assert isinstance(sketch, FactoredMap)
    for actual in (sketch.factors(form), sketch.dense(torch.empty(6, 5600, device=meta))):
        assert actual.device == meta and len(actual) == 6
