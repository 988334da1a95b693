"""A small fixed part of the sanity of numbers in faults/: right trials, and planted wrong ones."""

import random

import pytest
import torch

from faults import sanity
from faults.forks import import_package
from faults.numeric_runs import POOL, NumericRun
from faults.sanity import KINDS, run_sanity, try_trial
from faults.sanity_judges import (
    Bench,
    Question,
    compare_bytes,
    compare_trace,
    compare_variants,
    compare_with_reference,
    refuse_zeros,
)
from faults.tally import Tally
from influence_cli.methods import inner_products
from influence_cli.output import columns, ranking

LARGE = NumericRun(exponent=30)
TIES = NumericRun("integers", order=(3, 1, 3, 3, 0, 1))
TRIALS = {
    "large losses": lambda bench: compare_with_reference(
        bench, Question("tracin", LARGE, ("--normalize",)), False
    ),
    "small losses": lambda bench: compare_with_reference(
        bench, Question("unroll", NumericRun("words", -30)), False
    ),
    "subnormal losses": lambda bench: compare_with_reference(
        bench, Question("grad-dot", NumericRun(exponent=-44)), True
    ),
    "exact ties": lambda bench: compare_with_reference(
        bench, Question("tracin", TIES, ("--store", "float16"), 0.0), False
    ),
    "one store": lambda bench: compare_with_reference(
        bench, Question("dve", NumericRun("convolution"), ("--store", "int8"), 2e-2), False
    ),
    "batches": lambda bench: compare_variants(
        bench, *(Question("tracin-we", NumericRun("words"), ("--batch-size", n)) for n in "27"), 1e-6
    ),
    "bytes": lambda bench: compare_bytes(bench, Question("self", NumericRun())),
    "trace": lambda bench: compare_trace(bench, Question("dve", NumericRun())),
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    threads = torch.get_num_threads()
    import_package()
    yield Bench(tmp_path_factory.mktemp("bench"))
    torch.set_num_threads(threads)


def outcome(bench, trial) -> Tally:
    tally = Tally("planted")
    try_trial(bench, "planted: a question", trial, tally)
    assert tally.tried == 1
    return tally


@pytest.mark.parametrize("name", TRIALS)
def test_numbers_are_right_or_refused(name, bench):
    tally = outcome(bench, TRIALS[name])
    assert tally.is_clean, tally.causes
    assert tally.refused == (name == "subnormal losses")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "threads"])
def test_each_kind_of_trial_is_clean(kind, bench):
    question, trial = KINDS[kind][0](random.Random(3))
    tally = outcome(bench, trial)
    assert tally.is_clean, (question, tally.causes)


def test_threads_do_not_change_scores(bench):
    _, trial = KINDS["threads"][0](random.Random(3))
    assert outcome(bench, trial).is_clean


def test_a_seed_draws_the_same_trials(monkeypatch):
    def draw(seed):
        names = []
        monkeypatch.setattr(sanity, "try_trial", lambda _, name, trial, tally: names.append(name))
        run_sanity(10**6, 0.2, seed)
        return names[:10]

    assert len(draw(1)) == 10
    assert draw(1) == draw(1) != draw(2)


# ---------------------------------------------------------------- planted
def plant_wrong_scores(monkeypatch):
    products = inner_products.inner_products
    monkeypatch.setattr(
        inner_products, "inner_products", lambda *args: products(*args) * (1 + 1e-4)
    )


def plant_noise(monkeypatch):
    products = inner_products.inner_products
    monkeypatch.setattr(
        inner_products,
        "inner_products",
        lambda *args: products(*args) * (1 + 1e-3 * torch.rand(1, generator=random_generator())),
    )


def random_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def plant_another_order(monkeypatch):
    pairs = ranking.merge_partial_rankings
    monkeypatch.setattr(
        ranking, "merge_partial_rankings", lambda partials: reversed(list(pairs(partials)))
    )


def plant_silence(monkeypatch):
    from influence_cli.methods import pairwise

    monkeypatch.setattr(pairwise, "report_numbers", lambda *args: None)


def plant_traceback(monkeypatch):
    monkeypatch.setattr(columns, "score_rows", lambda *args: 1 / 0)


TRACIN = Question("tracin", NumericRun())
ZEROS = NumericRun(zero={"train": list(range(POOL)), "query": []})


@pytest.mark.parametrize(
    ("plant", "trial", "cause"),
    [
        (plant_wrong_scores, TRIALS["exact ties"], "silent: planted: other scores than float64"),
        (plant_noise, lambda bench: compare_bytes(bench, TRACIN), "silent: planted: two runs give"),
        (
            plant_noise,
            lambda bench: compare_variants(bench, TRACIN, TRACIN, 1e-6),
            "silent: planted: scores depend on the way",
        ),
        (plant_another_order, TRIALS["exact ties"], "silent: planted: another order"),
        (
            plant_silence,
            lambda bench: refuse_zeros(bench, Question("tracin", ZEROS)),
            "silent: planted: a table of zeros",
        ),
        (
            plant_traceback,
            lambda bench: compare_bytes(bench, TRACIN),
            "traceback: exit 1: ZeroDivisionError",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_counted(plant, trial, cause, bench, monkeypatch):
    plant(monkeypatch)
    tally = outcome(bench, trial)
    assert [key.startswith(cause) for key in tally.causes] == [True], tally.causes
