"""--by token and --by query-token against autograd with a copy of the weights for each position, in float64."""

from collections import defaultdict

import pytest
import torch

from influence_cli import open_run
from tests import reference
from tests.conftest import build_run
from tests.position_runs import GPT, READER, gradients_by_position, load_definition, models, single
from tests.refusals import refused, replaced

EXACT = ("--precision", "float64", "--queries", "0,2", "--top", "3")
EMBEDDINGS = "nn.Embedding(8, 6), nn.Embedding"
PADDED = (EMBEDDINGS, EMBEDDINGS.replace("6)", "6, padding_idx=0)"))


def parts_of(result, column: str) -> dict[tuple[int, int], dict[str, float]]:
    """(query, train) -> part -> score."""
    assert result.code == 0, result.err
    parts: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for row in result.rows:
        pair = int(row["query"]), int(row["train"])
        assert row[column] not in parts[pair]
        parts[pair][row[column]] = float(row["score"])
    return parts


def scores_of(result) -> dict[tuple[int, int], float]:
    assert result.code == 0, result.err
    return {(int(row["query"]), int(row["train"])): float(row["score"]) for row in result.rows}


def expected_train_parts(run, pairs, length: int):
    """(query, train) -> (S,) parts of positions, and the part without one."""
    space = load_definition(run)
    train, queries = space["train_data"](), space["query_data"]()
    values = {pair: torch.zeros(length, dtype=torch.float64) for pair in pairs}
    rests = dict.fromkeys(pairs, 0.0)
    for number in range(2):
        for query, example in pairs:
            model, rate = list(models(run, space))[number]
            batch = single(space, queries, query)
            grads = reference.gradients(model, space["loss"], [batch])
            at, rest = gradients_by_position(
                model, space["loss"], single(space, train, example), length
            )
            for name, grad in at.items():
                values[query, example] += rate * (grad * grads[name]).flatten(1).sum(1)
            for name, grad in rest.items():
                rests[query, example] += rate * float((grad * grads[name][0]).sum())
    return values, rests


@pytest.mark.parametrize("definition, length", [(GPT, 6), (READER, 4)], ids=["gpt", "reader"])
def test_parts_are_those_of_a_copy_of_the_weights_for_each_position(
    definition, length, tmp_path, influence
):
    run = build_run(tmp_path / "run", definition)
    parts = parts_of(influence("score", run, *EXACT, "--by", "token"), "token")
    assert len(parts) > 5
    values, rests = expected_train_parts(run, parts, length)
    for pair, named in parts.items():
        assert ("-" in named) == (definition is READER)
        rest = named.pop("-", 0.0)
        assert [name.split(":")[0] for name in named] == [str(s) for s in range(length)]
        scale = float(values[pair].abs().sum())
        assert list(named.values()) == pytest.approx(values[pair].tolist(), abs=1e-9 * scale)
        assert rest == pytest.approx(rests[pair], abs=1e-9 * scale)


def test_parts_of_a_text_are_named_by_position_and_token(tmp_path, influence):
    """Example 0 is "b e b b e": a token that comes again has a part at each of its positions."""
    run = build_run(tmp_path / "run", GPT)
    result = influence("score", run, "--queries", "0", "--top", "1", "--by", "token")
    assert result.out.splitlines()[0].startswith("query,kind,rank,train,token,score,")
    names = [row["token"] for row in result.rows if row["kind"] == "proponent"]
    assert names == ["0:b", "1:e", "2:b", "3:b", "4:e", "5:<pad>"]
    run = build_run(tmp_path / "plain", replaced(GPT, ("def token(id)", "def other(id)")))
    result = influence("score", run, "--queries", "0", "--top", "1", "--by", "token")
    assert [row["token"] for row in result.rows][:2] == ["0:2", "1:5"]
    run = build_run(tmp_path / "reader", READER)
    result = influence("score", run, "--queries", "0", "--top", "1", "--by", "token")
    assert [row["token"] for row in result.rows][:5] == ["0:", "1:", "2:", "3:", "-"]


MASKED = (
    "[:-1]}",
    '[:-1]} | {"attention_mask": torch.tensor([[1] * len(i) + [0] * (6 - len(i)) for i in items])}',
)
HIDDEN = {"padding_idx of the embedding": (PADDED,), "attention_mask": (MASKED,)}


@pytest.mark.parametrize("changes", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("by", ["token", "query-token"])
def test_padding_has_no_rows(changes, by, tmp_path, influence):
    run = build_run(tmp_path / "run", replaced(GPT, *changes))
    whole = influence("score", run, *EXACT)
    parts = parts_of(influence("score", run, *EXACT, "--by", by), by)
    assert not any("<pad>" in name for named in parts.values() for name in named)
    assert {len(named) for named in parts.values()} > {3}
    for pair, score in scores_of(whole).items():
        assert sum(parts[pair].values()) == pytest.approx(score, rel=1e-9)


WAYS = {
    "tracin": (),
    "grad-dot": ("--method", "grad-dot"),
    "grad-cos": ("--method", "grad-cos"),
    "tracin, normalized": ("--normalize",),
    "influence": ("--method", "influence"),
    "influence, kfac": ("--method", "influence", "--curvature", "kfac", "--normalize"),
    "no cache": ("--cache", "none"),
    "all pairs": ("--top", "all"),
    "two layers": ("--layers", "tokens.*", "--layers", "block.out.*"),
}


@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("by", ["token", "query-token"])
def test_parts_sum_to_the_score(by, flags, tmp_path, influence):
    run = build_run(tmp_path / "run", GPT)
    whole = scores_of(influence("score", run, *EXACT, *flags))
    parts = parts_of(influence("score", run, *EXACT, *flags, "--by", by), by)
    assert list(parts) == list(whole)
    for pair, score in whole.items():
        size = sum(map(abs, parts[pair].values()))
        assert len(parts[pair]) == 6
        assert sum(parts[pair].values()) == pytest.approx(score, rel=1e-8, abs=1e-8 * size)


ATTENTION = ("nn.Linear(3, 5)", "Attention()")
ENCODER = """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.widen = nn.Linear(3, 5)
        self.layer = nn.TransformerEncoderLayer(5, 1, 7, batch_first={first}, dropout=0.0)

    def forward(self, x):
        h = self.widen(x)
        return self.layer(h) if {first} else self.layer(h.transpose(0, 1)).transpose(0, 1)

class Reader"""
ODD = ("self.norm(self.mix(x))", "torch.einsum('bsf,fg->bsg', self.norm(self.mix(x)), self.odd)")
OTHER_MODELS = {
    "attention, examples first": replaced(READER, ATTENTION, ("class Reader", ENCODER.format(first=True))),
    "attention, positions first": replaced(READER, ATTENTION, ("class Reader", ENCODER.format(first=False))),
    "a parameter without a rule": replaced(READER, ODD, ("self.place =", "self.odd, self.place = nn.Parameter(torch.randn(5, 5)),")),
}  # fmt: skip


@pytest.mark.parametrize("definition", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_parts_of_other_models_sum_to_the_score(definition, tmp_path, influence):
    """The reader's last layer, and a parameter that no layer rule computes, have no position."""
    run = build_run(tmp_path / "run", definition)
    whole = scores_of(influence("score", run, *EXACT))
    parts = parts_of(influence("score", run, *EXACT, "--by", "token"), "token")
    only = parts_of(
        influence("score", run, *EXACT, "--top", "all", "--layers", "!out.*", "--by", "token"),
        "token",
    )
    for pair, score in whole.items():
        assert list(parts[pair]) == ["0:", "1:", "2:", "3:", "-"]
        size = sum(map(abs, parts[pair].values()))
        assert sum(parts[pair].values()) == pytest.approx(score, abs=1e-9 * size)
        assert ("-" in only[pair]) == ("odd" in definition)


def test_the_mean_of_queries_is_split_as_one_query(tmp_path, influence):
    run = build_run(tmp_path / "run", GPT)
    flags = ("--sum-queries", "--precision", "float64", "--top", "2")
    rows = influence("score", run, *flags, "--by", "token").rows
    for whole in influence("score", run, *flags).rows:
        parts = [float(row["score"]) for row in rows if row["train"] == whole["train"]]
        assert len(parts) == 6
        assert sum(parts) == pytest.approx(float(whole["score"]), rel=1e-9)
    assert {row["query"] for row in rows} == {"all"}


GOLDEN = """query,kind,rank,train,token,score
0,proponent,1,0,0:b,22.6181
0,proponent,1,0,1:e,16.2544
0,proponent,1,0,2:b,-0.309643
0,proponent,1,0,3:b,20.1499
0,proponent,1,0,4:e,0
"""


def test_the_table_of_tokens_stays_as_it_is(tmp_path, influence):
    """The last token is in no prediction, so its share is 0."""
    run = build_run(tmp_path / "run", replaced(GPT, PADDED))
    result = influence("score", run, "--queries", "0", "--top", "1", "--by", "token")
    lines = ["query,kind,rank,train,token,score"]
    for row in result.rows:
        cells = [row[name] for name in ("query", "kind", "rank", "train", "token")]
        lines.append(",".join([*cells, f"{float(row['score']):.6g}"]))
    assert "\n".join(lines) + "\n" == GOLDEN


def test_the_exact_inverse_of_the_curvature_splits_over_the_training_example(tmp_path, influence):
    run = build_run(tmp_path / "run", GPT)
    flags = (
        *EXACT,
        "--method",
        "influence",
        "--curvature",
        "gauss-newton",
        "--layers",
        "block.out.*",
    )
    gauss_newton = "\ndef outputs(model, batch):\n    return model(batch['input_ids'])\n"
    gauss_newton += (
        "\ndef loss_from_outputs(outputs, batch):\n    return loss(lambda ids: outputs, batch)\n"
    )
    (run / "definition.py").write_text(GPT + gauss_newton)
    whole = scores_of(influence("score", run, *flags))
    parts = parts_of(influence("score", run, *flags, "--by", "token"), "token")
    for pair, score in whole.items():
        assert sum(parts[pair].values()) == pytest.approx(score, rel=1e-8)
    result = influence("score", run, *flags, "--by", "query-token")
    refused(result, 2, "exact curvature solves for the queries only", "--by token")


def test_parts_of_query_tokens_are_products_with_the_gradients_of_their_measures(
    tmp_path, influence
):
    run = build_run(tmp_path / "run", GPT)
    parts = parts_of(influence("score", run, *EXACT, "--by", "query-token"), "query-token")
    space = load_definition(run)
    train, queries = space["train_data"](), space["query_data"]()
    for (query, example), named in parts.items():
        expected = torch.zeros(6, dtype=torch.float64)
        for model, rate in models(run, space):
            batch = single(space, train, example)
            grads = reference.gradients(model, space["loss"], [batch])
            for s in range(6):
                rows = reference.gradients(
                    model,
                    lambda model, batch, s=s: -space["measure_tokens"](model, batch)[:, s],
                    [single(space, queries, query)],
                )
                expected[s] += rate * sum((grads[name] * rows[name]).sum() for name in grads)
        scale = float(expected.abs().sum())
        assert list(named.values()) == pytest.approx(expected.tolist(), abs=1e-9 * scale)


def test_a_measure_is_split_with_its_sign(tmp_path, influence):
    measured = (
        GPT + "\ndef measure(model, batch):\n    return measure_tokens(model, batch).sum(1)\n"
    )
    plain, run = build_run(tmp_path / "plain", GPT), build_run(tmp_path / "run", measured)
    results = [influence("score", place, "--by", "query-token") for place in (plain, run)]
    assert results[0].rows == results[1].rows


def test_parts_of_shards_are_those_of_one_table(tmp_path, influence):
    run = build_run(tmp_path / "run", GPT)
    for by in ("token", "query-token"):
        places = [tmp_path / f"{by}-{part}.csv" for part in (1, 2)]
        for part, place in enumerate(places, start=1):
            result = influence(
                "score", run, *EXACT, "--by", by, "--shard", f"{part}/2", "-o", place
            )
            assert result.code == 0, result.err
        merged = influence("merge", *places, "--top", "3")
        assert merged.code == 0, merged.err
        assert merged.out == influence("score", run, *EXACT, "--by", by).out


def test_python_has_the_parts_of_the_command_line(tmp_path, influence):
    run = build_run(tmp_path / "run", GPT)
    for by in ("token", "query-token"):
        rows = open_run(run).score(by=by, top=2).rows()
        expected = influence("score", run, "--by", by, "--top", "2").rows
        field = by.replace("-", "_")
        assert [getattr(row, field) for row in rows] == [row[by] for row in expected]
        assert [row.score for row in rows] == [float(row["score"]) for row in expected]


def test_batches_and_the_cache_do_not_change_parts(tmp_path, influence):
    run = build_run(tmp_path / "run", GPT)
    for by in ("token", "query-token"):
        first = influence("score", run, *EXACT, "--by", by)
        again = influence("score", run, *EXACT, "--by", by, "--batch-size", "2", "--cache", "none")
        for one, other in zip(first.rows, again.rows, strict=True):
            assert float(one["score"]) == pytest.approx(float(other["score"]), rel=1e-8, abs=1e-12)


POOLED = replaced(
    READER,
    ("self.mix(x)", "self.mix(x.flatten(1)).unsqueeze(1)"),
    ("nn.Linear(3, 5)", "nn.Linear(12, 5)"),
    ("* self.place", "+ self.place.sum()"),
)
NO_MEASURE = ("def measure_tokens", "def other")
REFUSALS = {
    "groups": (GPT, ("token", "--group-by", "label"), 2, "--by token splits the scores of pairs, --group-by sums"),
    "groups of queries": (GPT, ("query-token", "--group-by", "label"), 2, "--by query-token splits"),
    "summed queries": (GPT, ("query-token", "--sum-queries"), 2, "--sum-queries sums all queries"),
    "projection": (GPT, ("token", "--project", "8"), 2, "--by token splits exact gradients, --project"),
    "rounded": (GPT, ("token", "--store", "int8"), 2, "--store int8 rounds them\n  add --store float32"),
    "dve": (GPT, ("token", "--method", "dve"), 2, "--by token: the scores of dve have no such parts"),
    "trak": (GPT, ("query-token", "--method", "trak"), 2, "the scores of trak have no such parts"),
    "no measure": (replaced(GPT, NO_MEASURE), ("query-token",), 2, "--by query-token needs measure_tokens(model, batch)"),
    "no positions": (POOLED, ("token",), 1, "no layer of the model reads a sequence of positions"),
    "another sum": (replaced(GPT, ("return -token_losses(model, batch)", "return -2 * token_losses(model, batch)")), ("query-token",), 1, "do not sum to the query's -loss()"),
    "one number": (replaced(GPT, ("return -token_losses(model, batch)", "return -loss(model, batch)")), ("query-token",), 1, "returned shape (1,) for a batch of 1"),
    "no tensor": (replaced(GPT, ("return -token_losses(model, batch)", "return 3")), ("query-token",), 1, "measure_tokens() returned a int"),
    "no gradient": (replaced(GPT, ("return -token_losses(model, batch)", "return -token_losses(model, batch).detach()")), ("query-token",), 1, "without a gradient"),
    "an error": (replaced(GPT, ("return -token_losses(model, batch)", "return 1 / 0")), ("query-token",), 1, "measure_tokens() in definition.py raised ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("definition, flags, code, text", REFUSALS.values(), ids=REFUSALS)
def test_what_can_not_be_split_is_refused(definition, flags, code, text, tmp_path, influence):
    run = build_run(tmp_path / "run", definition)
    refused(influence("score", run, "--by", *flags), code, *text.split("\n"))
