"""Numbers at the edge of what floats hold, and losses that say nothing: right scores, or a message."""

import pytest
import torch

from tests import reference
from tests.conftest import DEFINITION
from tests.refusals import refused, replaced

LOSS = 'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")'

# query 0 has no target: its loss and its gradient are 0
TOKENS = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Embedding(12, 4), nn.Tanh(), nn.Linear(4, 12))

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 12, (number, 5), generator=generator)

def train_data():
    ids = examples(0, 8)
    return [(row, row.clone()) for row in ids]

def query_data():
    ids = examples(1, 3)
    return [(row, torch.full((5,), -100) if i == 0 else row.clone()) for i, row in enumerate(ids)]

def loss(model, batch):
    ids, targets, texts = batch
    logits = model(ids)[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(logits, targets[:, 1:], reduction="none", ignore_index=-100)
    return losses.sum(1)

def collate(items):  # texts in a batch: one example at a time
    return (
        torch.stack([item[0] for item in items]),
        torch.stack([item[1] for item in items]),
        [str(item[0].tolist()) for item in items],
    )
"""


# ---------------------------------------------------------------- zero gradients
@pytest.mark.parametrize("flags", [(), ("--cache", "none"), ("--top", "all"), ("--normalize",)])
def test_a_query_without_targets_has_zero_scores(flags, make_run, influence):
    result = influence("score", make_run(definition=TOKENS), "--queries", "0", *flags)
    assert result.code == 0, result.err
    assert all(float(row["score"]) == 0 for row in result.rows)
    assert len(result.rows) == (8 if "all" in flags else 0)


def test_check_reads_a_cached_zero_gradient(make_run, influence):
    run = make_run(definition=TOKENS)
    assert influence("score", run, "--queries", "0").code == 0
    assert influence("check", run, "--queries", "0").code == 0


def test_check_names_the_example_whose_loss_is_nan(make_run, influence):
    loss = LOSS + " + torch.where(batch[0][:, 0] == train_data()[3][0][0], torch.nan, 0.0)"
    run = make_run(definition=replaced(DEFINITION, (LOSS, loss)))
    refused(influence("check", run), 1, "the loss is not finite", "example 3 of train_data()")


# ---------------------------------------------------------------- scaled losses
def scaled_scores(factor, query_rows=6):
    """(Q, N) of float64 autograd on the unscaled losses, times factor squared."""
    space: dict = {"__name__": "definition_of_a_test"}
    exec(compile(DEFINITION, "definition.py", "exec"), space)
    scores = torch.zeros(query_rows, 20, dtype=torch.float64)
    for step, rate in ((10, 0.1), (20, 0.05)):
        torch.manual_seed(step)
        model = space["model"]().double()
        train, query = (
            reference.flat(
                reference.gradients(
                    model,
                    space["loss"],
                    [(x[None].double(), y[None]) for x, y in space[f"{split}_data"]()],
                )
            )
            for split in ("train", "query")
        )
        scores += rate * (query @ train.T)
    return scores * factor**2


def table_of(result):
    assert result.code == 0, result.err
    scores = torch.zeros(6, 20, dtype=torch.float64)
    for row in result.rows:
        scores[int(row["query"]), int(row["train"])] += float(row["score"])
    return scores


def scaled_definition(factor):
    return replaced(DEFINITION, (LOSS, f"{LOSS} * {factor!r}"))


@pytest.mark.parametrize("factor", [1e19, 1e30, 1e-19, 1e-30])
@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        ((), 1e-5),
        (("--cache", "none"), 1e-5),
        (("--store", "float16"), 2e-3),
        (("--store", "bfloat16"), 2e-2),
        (("--by", "layer"), 1e-5),
        (("--precision", "float64"), 1e-9),
    ],
    ids=str,
)
def test_scores_of_scaled_losses_are_the_scaled_scores(factor, flags, limit, make_run, influence):
    run = make_run(definition=scaled_definition(factor))
    scores = table_of(influence("score", run, "--top", "all", *flags))
    # capture in float32 loses 1e-5 at worst, as it does unscaled; float64 compares the rounded
    # parameters of the checkpoint, which are exact
    assert reference.relative_error(scores, scaled_scores(factor)) < limit


@pytest.mark.parametrize("factor", [1e19, 1e30, 1e-30])
@pytest.mark.parametrize(
    "flags",
    [("--normalize",), ("--method", "grad-cos"), ("--project", "8", "--normalize")],
    ids=str,
)
def test_cosines_do_not_depend_on_the_scale_of_the_loss(factor, flags, make_run, influence):
    plain, scaled = (
        table_of(influence("score", make_run(name, text), "--top", "all", *flags))
        for name, text in (("plain", DEFINITION), ("scaled", scaled_definition(factor)))
    )
    assert (plain - scaled).abs().max() < 1e-5  # a cosine is at most 1


@pytest.mark.parametrize("factor", [1e19, 1e30, 1e-30])
@pytest.mark.parametrize("command", ["score", "self"])
def test_projected_and_self_scores_scale(factor, command, make_run, influence):
    flags = ("--project", "8") if command == "score" else ()
    plain, scaled = (
        influence(command, make_run(name, text), "--top", "all", *flags).rows
        for name, text in (("plain", DEFINITION), ("scaled", scaled_definition(factor)))
    )
    expected, computed = (
        {(row.get("query"), row["train"]): float(row["score"]) for row in rows}
        for rows in (plain, scaled)
    )
    largest = max(map(abs, expected.values()))
    for key, score in expected.items():
        assert abs(computed[key] / factor**2 - score) < 1e-5 * largest


@pytest.mark.parametrize("factor", [1e19, 1e-30])
def test_word_scores_of_scaled_losses_are_the_scaled_scores(factor, make_run, influence):
    def scores(name, text, *flags):
        run = make_run(name, text)
        rows = influence("score", run, "--method", "tracin-we", "--top", "all", *flags).rows
        return {(row["query"], row["train"]): float(row["score"]) for row in rows}

    text = TOKENS.replace("losses.sum(1)", f"losses.sum(1) * {factor!r}")
    expected, computed = scores("plain", TOKENS), scores("scaled", text)
    largest = max(map(abs, expected.values()))
    assert largest > 0
    for key, score in expected.items():
        assert abs(computed[key] / factor**2 - score) < 1e-5 * largest


@pytest.mark.parametrize("method", ["tracin", "tracin-we"])
def test_a_learning_rate_that_makes_scores_overflow_is_refused(method, make_run, influence):
    text = TOKENS.replace("losses.sum(1)", "losses.sum(1) * 100")
    result = influence("score", make_run(definition=text), "--lr", "1e308", "--method", method)
    refused(result, 1, "the score of training example", "checkpoints/step-000010", "--lr")


def test_self_influence_that_overflows_is_refused(make_run, influence):
    run = make_run(definition=scaled_definition(100))
    refused(influence("self", run, "--lr", "1e308"), 1, "the score of training example", "--lr")


@pytest.mark.parametrize("command", ["score", "self"])
def test_a_learning_rate_that_makes_scores_underflow_is_refused(command, make_run, influence):
    refused(influence(command, make_run(), "--lr", "1e-320"), 1, "all scores underflow", "--lr")


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_cosines_of_features_do_not_depend_on_their_scale(factor, make_run, influence):
    def scores(name, scale):
        text = DEFINITION + f"\ndef features(model, batch):\n    return batch[0] * {scale!r}\n"
        run = make_run(name, text)
        return table_of(influence("score", run, "--method", "repsim", "--top", "all"))

    assert (scores("plain", 1.0) - scores("scaled", factor)).abs().max() < 1e-6


def test_features_that_are_not_finite_name_the_example(make_run, influence):
    text = DEFINITION + "\ndef features(model, batch):\n    return batch[0] / 0\n"
    result = influence("score", make_run(definition=text), "--method", "repsim")
    refused(result, 1, "the features are not finite", "example 0 of query_data()")


# ---------------------------------------------------------------- losses that say nothing
ONE_LOGIT = replaced(
    DEFINITION, ("nn.Linear(5, 3)", "nn.Linear(5, 1)"), ("torch.randint(0, 3", "torch.randint(0, 1")
)


@pytest.mark.parametrize(
    "command", [("score",), ("score", "--queries", "0"), ("self",), ("score", "--cache", "none")]
)
def test_a_constant_loss_is_refused(command, make_run, influence):
    result = influence(command[0], make_run(definition=ONE_LOGIT), *command[1:])
    refused(result, 1, "every loss() and every gradient of train_data() is 0", "one logit", "-100")


def test_check_fails_a_constant_loss(make_run, influence):
    result = influence("check", make_run(definition=ONE_LOGIT))
    assert result.code == 1
    assert "zeros of train examples: every gradient" in result.err
    assert "one logit" in result.err


def test_a_constant_measure_is_refused(make_run, influence):
    measure = "\ndef measure(model, batch):\n    return model(batch[0]).sum(1) * 0 + 1\n"
    result = influence("score", make_run(definition=DEFINITION + measure))
    refused(result, 1, "every gradient of query_data() is 0", "constant")


def test_zero_queries_are_named_once(make_run, influence):
    result = influence("score", make_run(definition=TOKENS))
    assert result.code == 0
    assert result.err.count("the gradient of query 0 is 0") == 1
    assert {row["query"] for row in result.rows} == {"1", "2"}


def collating(body):
    return DEFINITION + f"\ndef collate(items):\n    {body}\n    return default(items)\n".replace(
        "default", "torch.utils.data.default_collate"
    )


@pytest.mark.parametrize(
    "definition",
    [
        collating("items = items[::-1]"),
        collating("items = sorted(items, key=lambda item: float(item[0].sum()))"),
        collating("items = [items[0]] * len(items)"),
        replaced(DEFINITION, (LOSS, LOSS + ".sort().values")),
        replaced(DEFINITION, (LOSS, LOSS + ".roll(1)")),
    ],
    ids=["reversed", "sorted", "repeated", "sorted losses", "rolled losses"],
)
@pytest.mark.parametrize("factor", [1, 1e-30])
def test_a_batch_in_another_order_is_refused(definition, factor, make_run, influence):
    definition = definition.replace(LOSS, LOSS.replace("return F", f"return {factor} * F"))
    result = influence("score", make_run(definition=definition))
    refused(result, 1, "in a batch, loss() gives example", "collate()")


def test_a_batch_that_only_shifts_losses_is_accepted(make_run, influence):
    definition = replaced(DEFINITION, (LOSS, LOSS + " + model(batch[0]).mean()"))
    result = influence("score", make_run(definition=definition))
    assert result.code == 0, result.err
    assert "examples influence each other" in result.err


@pytest.mark.parametrize("dropped", [0, 1, 13])
def test_a_collate_that_drops_examples_is_named(dropped, make_run, influence):
    body = f"items = [i for i in items if i[0][0] != train_data()[{dropped}][0][0]]"
    empty = "if not items: return [torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)]"
    result = influence("score", make_run(definition=collating(f"{body}\n    {empty}")))
    message = "collate() returned fewer examples than it got items of train_data()"
    refused(result, 1, f"{message}; it drops item {dropped}")


# ---------------------------------------------------------------- notes on precision
def test_small_losses_in_float32_are_counted_once(make_run, influence):
    definition = replaced(DEFINITION, (LOSS, LOSS + " * (batch[0][:, 0] > 0)"))
    run = make_run(definition=definition)
    space: dict = {"__name__": "definition_of_a_test"}
    exec(compile(definition, "definition.py", "exec"), space)
    small = sum(bool(x[0] <= 0) for x, _ in space["train_data"]())
    assert 0 < small < 20
    for _ in range(2):  # computed, then cached
        err = influence("score", run).err
        assert err.count(f"{small} of 20 training examples have a loss below 1e-05") == 1
        assert "--precision float64" in err
    assert "a loss below" not in influence("score", run, "--precision", "float64").err


def test_half_precision_is_noted_with_its_effect(make_run, influence):
    definition = replaced(
        DEFINITION,
        ("nn.Linear(5, 3))", "nn.Linear(5, 3)).to(torch.bfloat16)"),
        ("model(batch[0])", "model(batch[0].to(next(model.parameters()).dtype))"),
    )
    result = influence("score", make_run(definition=definition))
    assert result.code == 0, result.err
    (line,) = [line for line in result.err.splitlines() if "computed in bfloat16" in line]
    percent = float(line.split("float32 by ")[1].split("%")[0])
    assert 0.1 < percent < 5  # one rounding is at most 0.4 %; a few layers add up
    assert "--precision float32" in line


# ---------------------------------------------------------------- the user's code
def test_warnings_of_the_users_code_are_shown_once(make_run, influence):
    warn = 'warnings.warn(f"{len(batch[0])} examples of mine")'
    definition = "import warnings\n" + replaced(DEFINITION, (LOSS, f"{warn}\n    {LOSS}"))
    result = influence("score", make_run(definition=definition), "--batch-size", "3")
    assert result.code == 0, result.err
    assert result.err.count("examples of mine") == 1
    assert "definition.py line" in result.err


BROKEN = """
class Broken(str):
    def __str__(self):
        raise ValueError("no text")
    __repr__ = __str__
"""


@pytest.mark.parametrize("value", ["Broken('a')", "10**5000"])
@pytest.mark.parametrize("function", ["label", "describe"])
def test_a_description_that_fails_to_print_is_refused(function, value, make_run, influence):
    text = DEFINITION + BROKEN + f"\ndef {function}(example):\n    return {value}\n"
    result = influence("score", make_run(definition=text))
    refused(result, 1, f"{function}() of example", "that can't be printed: ValueError")


@pytest.mark.parametrize("value", ["Broken('a')", "10**5000"])
@pytest.mark.parametrize(("split", "call"), [("train", "(0, 20)"), ("query", "(1, 6)")])
def test_an_item_that_fails_to_print_is_refused(split, call, value, make_run, influence):
    text = replaced(DEFINITION, (f"return examples{call}", "return items()")) + BROKEN
    text += f"\ndef items():\n    return [(x, y, {value}) for x, y in examples{call}]\n"
    text += "\ndef collate(items):\n    columns = list(zip(*items))\n"
    text += "    return [torch.stack(column) for column in columns[:2]]\n"
    result = influence("score", make_run(definition=text))
    refused(result, 1, f"example 0 of {split}_data()", "ValueError when it is printed")


@pytest.mark.parametrize("factor", [1e-60, 1e60])
@pytest.mark.parametrize("store", ["float32", "float16", "bfloat16", "int8"])
def test_float64_gradients_past_a_narrow_store_are_refused(factor, store, make_run, influence):
    text = replaced(DEFINITION, (LOSS, LOSS.replace("return F", f"return {factor} * F")))
    result = influence(
        "score", make_run(definition=text), "--precision", "float64", "--store", store
    )
    refused(result, 1, "do not fit into --store", "the largest norm is", "--store float64")


@pytest.mark.parametrize("factor", [1e-60, 1e60])
def test_float64_scores_of_scaled_losses_are_the_scaled_scores(factor, make_run, influence):
    run = make_run(definition=scaled_definition(factor))
    scores = table_of(influence("score", run, "--top", "all", "--precision", "float64"))
    assert reference.relative_error(scores / factor**2, scaled_scores(1)) < 1e-9
