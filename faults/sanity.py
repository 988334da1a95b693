"""Sanity of numbers: scores at the edge of floats, and scores that must not depend on how they
were computed.

A trial is right (it agrees with float64 autograd, one example at a time), refused cleanly (an
error, or a note that its digits are few), or silent (other numbers without a word).
"""

import dataclasses
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from faults.forks import import_package
from faults.numeric_runs import FEATURES, MEASURE, POOL, NumericRun
from faults.sanity_judges import (
    EXACT,
    FLOAT64,
    METHODS,
    PRODUCTS,
    SAME,
    STORES,
    Bench,
    CommandFault,
    Question,
    WrongTable,
    compare_bytes,
    compare_threads,
    compare_trace,
    compare_variants,
    compare_with_reference,
    note_zero_query,
    refuse_zeros,
)
from faults.tally import Clock, Tally

Trial = Callable[[Bench], bool]  # returns whether it was refused
SAFE = 30  # losses times 10^-30 to 10^30 must have right scores; float32 holds 10^-45 to 10^38


# ---------------------------------------------------------------- what is drawn
def draw_question(rng: random.Random, method: str = "", model: str = "") -> Question:
    """A method with flags that keep exact gradients or round them, on a run of the usual scale."""
    method = method or rng.choice(METHODS)
    models = ["words"] if method == "tracin-we" else ["mlp", "convolution", "words"]
    if method in PRODUCTS[:3]:
        models.append("integers")
    model = model if model in models else rng.choice(models)
    flags: list[tuple[tuple[str, ...], float]] = [
        ((), EXACT),
        (("--precision", "float64"), FLOAT64),
    ]
    if method in (*PRODUCTS, "self"):
        flags.append((("--cache", "none"), EXACT))
    if method in (*PRODUCTS, "dve"):
        flags += [(("--store", name), limit) for name, limit in STORES.items()]
    if method in ("dve", "unroll"):
        flags.append((("--replay",), 1e-4))
    if method == "dve":
        flags.append((("--form", "embedding"), EXACT))
    chosen, limit = rng.choice(flags)
    if method in ("tracin", "tracin-we") and rng.random() < 0.3:
        chosen = (*chosen, "--normalize")
    is_product = method != "grad-cos" and "--normalize" not in chosen
    if model == "integers" and is_product and limit <= STORES["float16"]:
        limit = 0.0  # small integers are exact
    return Question(method, NumericRun(model), chosen, limit)


def draw_scaled(rng: random.Random, question: Question) -> tuple[Question, bool]:
    """The question with losses of another scale, and whether it may be refused."""
    exponent = rng.choice((rng.randint(-SAFE, SAFE), rng.randint(-45, 38), -45, -38, -30, 30, 38))
    run = dataclasses.replace(question.run, exponent=exponent)
    limit = max(question.limit, EXACT) if question.limit != FLOAT64 else FLOAT64
    # the curvature of dve is quadratic in the loss: at a large scale it diverges
    safe = abs(exponent) <= SAFE and not (question.method == "dve" and exponent > 3)
    return dataclasses.replace(question, run=run, limit=limit), not safe


def draw_trial(rng: random.Random) -> tuple[str, Trial]:
    """The kind of a trial with its question, for the table of causes, and the trial."""
    weights = [weight for _, weight in KINDS.values()]
    (kind,) = rng.choices(tuple(KINDS), weights)
    question, trial = KINDS[kind][0](rng)
    return f"{kind}: {question}", trial


def trial_of_scale(rng: random.Random) -> tuple[Question, Trial]:
    question, may_refuse = draw_scaled(rng, draw_question(rng))
    return question, lambda bench: compare_with_reference(bench, question, may_refuse)


def trial_of_measure(rng: random.Random) -> tuple[Question, Trial]:
    question, may_refuse = draw_scaled(rng, draw_question(rng, rng.choice(METHODS[:6])))
    run = dataclasses.replace(question.run, extra=MEASURE)
    question = dataclasses.replace(question, run=run)
    return question, lambda bench: compare_with_reference(bench, question, may_refuse)


def trial_of_projection(rng: random.Random) -> tuple[Question, Trial]:
    """Projected scores scale like exact ones."""
    question = draw_question(rng, rng.choice(PRODUCTS[:3]), rng.choice(("mlp", "words")))
    flags = (
        "--project",
        rng.choice(("3", "16")),
        *(f for f in question.flags if f == "--normalize"),
    )
    first = dataclasses.replace(question, flags=flags)
    run = dataclasses.replace(first.run, exponent=rng.randint(-SAFE, SAFE))
    second = dataclasses.replace(first, run=run)
    return second, lambda bench: compare_variants(bench, first, second, 2e-5)


def trial_of_zeros(rng: random.Random) -> tuple[Question, Trial]:
    question = draw_question(rng)
    zero = {"train": sorted(rng.sample(range(POOL), rng.randint(1, POOL - 1))), "query": []}
    run = dataclasses.replace(question.run, zero=zero)
    question = dataclasses.replace(question, run=run, limit=max(question.limit, 1e-9))
    return question, lambda bench: compare_with_reference(bench, question, False)


def trial_of_zero_query(rng: random.Random) -> tuple[Question, Trial]:
    question = draw_question(rng, rng.choice(METHODS[:-1]))
    extra = FEATURES if question.method == "repsim" else ""
    model = "mlp" if question.method == "repsim" else question.run.model
    run = NumericRun(model, zero={"train": [], "query": [2]}, extra=extra)
    question = dataclasses.replace(question, run=run)
    return question, lambda bench: note_zero_query(bench, question)


def trial_of_only_zeros(rng: random.Random) -> tuple[Question, Trial]:
    question = draw_question(rng)
    split = rng.choice(("train", "query")) if question.method != "self" else "train"
    extra = FEATURES if question.method == "repsim" else ""
    model = "mlp" if question.method == "repsim" else question.run.model
    zero = {"train": [], "query": []} | {split: list(range(POOL))}
    question = dataclasses.replace(question, run=NumericRun(model, zero=zero, extra=extra))
    return question, lambda bench: refuse_zeros(bench, question)


def trial_of_ties(rng: random.Random) -> tuple[Question, Trial]:
    """Equal examples: equal scores, in the order of their ids."""
    question = draw_question(rng)
    order = tuple(rng.choices(range(POOL), k=rng.choice((5, 17, 30))))
    question = dataclasses.replace(question, run=dataclasses.replace(question.run, order=order))
    return question, lambda bench: compare_with_reference(bench, question, False)


def limit_of_variants(question: Question) -> float:
    """Of the distance of two tables. A store rounds to steps, so that a bit may move a step."""
    return max([SAME, *(STORES[flag] for flag in question.flags if flag in STORES)])


def trial_of_batches(rng: random.Random) -> tuple[Question, Trial]:
    question = draw_question(rng)
    sizes = rng.sample(("1", "2", "7", "17"), 2)
    first, second = (
        dataclasses.replace(question, flags=(*question.flags, "--batch-size", size))
        for size in sizes
    )
    limit = limit_of_variants(question)
    return second, lambda bench: compare_variants(bench, first, second, limit)


def trial_of_order(rng: random.Random) -> tuple[Question, Trial]:
    first = draw_question(rng)
    order = tuple(rng.sample(range(POOL), POOL))
    second = dataclasses.replace(first, run=dataclasses.replace(first.run, order=order))
    limit = limit_of_variants(first)
    return second, lambda bench: compare_variants(bench, first, second, limit)


def trial_of_bytes(rng: random.Random) -> tuple[Question, Trial]:
    question = draw_question(rng)
    return question, lambda bench: compare_bytes(bench, question)


def trial_of_threads(rng: random.Random) -> tuple[Question, Trial]:
    method = rng.choice(("tracin", "grad-cos", "dve", "unroll", "repsim", "self"))
    question = dataclasses.replace(draw_question(rng, method), run=NumericRun("wide"), flags=())
    return question, lambda bench: compare_threads(bench, question)


def trial_of_trace(rng: random.Random) -> tuple[Question, Trial]:
    question, _ = draw_scaled(rng, draw_question(rng, rng.choice(("dve", "unroll"))))
    return question, lambda bench: compare_trace(bench, question)


KINDS: dict[str, tuple[Callable[[random.Random], tuple[Question, Trial]], float]] = {
    "scale": (trial_of_scale, 4),
    "measure": (trial_of_measure, 1),
    "projection": (trial_of_projection, 1),
    "zeros": (trial_of_zeros, 1),
    "zero query": (trial_of_zero_query, 1),
    "only zeros": (trial_of_only_zeros, 1),
    "ties": (trial_of_ties, 2),
    "batches": (trial_of_batches, 2),
    "order": (trial_of_order, 2),
    "bytes": (trial_of_bytes, 2),
    "threads": (trial_of_threads, 0.2),  # two processes that import torch
    "trace": (trial_of_trace, 1),
}


def run_sanity(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    """`count` trials: each asks one to three commands."""
    import_package()
    tally, rng, clock = Tally("sanity of numbers"), random.Random(seed), Clock(seconds)
    tally.target = count
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        while tally.tried < count and not clock.is_over:
            name, trial = draw_trial(rng)
            try_trial(bench, name, trial, tally)
            shutil.rmtree(Path(folder) / str(bench.number), ignore_errors=True)
    tally.seconds = clock.seconds
    return [tally]


def try_trial(bench: Bench, name: str, trial: Trial, tally: Tally) -> None:
    tally.tried += 1
    try:
        tally.refused += trial(bench)
    except WrongTable as error:
        tally.fault("silent", f"{name.partition(':')[0]}: {error}", name)
    except CommandFault as error:
        tally.fault(error.kind, str(error), name)
