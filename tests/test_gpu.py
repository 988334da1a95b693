"""Tables computed on a CUDA device are those of the CPU. `make gpu` runs this file."""

import pytest
import torch

from tests.cases import CASES
from tests.methods.test_tracin import OF_CASE
from tests.training import train

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LIMIT = 1e-4  # of the largest number; sums have another order

FLAGS = (
    "score --cache none",
    "score --cache none --normalize",
    "score --cache none --by layer",
    "score --cache none --precision float64",
    "score",
    "score --store int8",
    "score --project 8",
    "score --group-by label",
    "score --sum-queries",
    "score --method grad-cos",
    "score --method repsim",
    "self",
)


def cells(result, *keys):
    assert result.code == 0, result.err
    named = (tuple(row.get(key, "") for key in keys) for row in result.rows)
    return dict(zip(named, (float(row["score"]) for row in result.rows), strict=True))


def agree(influence, run, *arguments):
    """The command on both devices, each with a cache of its own."""
    keys = ("query", "train", "group", "layer", "value")
    command, *flags = arguments
    own = [] if "--cache" in flags else ["--cache"]
    on_device, expected = (
        cells(
            influence(
                command,
                run,
                "--top",
                "all",
                "--device",
                device,
                *flags,
                *(part for part in (*own, run / f"cache-{device}") if own),
            ),
            *keys,
        )
        for device in (DEVICE, "cpu")
    )
    assert on_device.keys() == expected.keys()
    largest = max(map(abs, expected.values()))
    assert max(abs(on_device[key] - expected[key]) for key in expected) < LIMIT * largest


@pytest.mark.parametrize("arguments", FLAGS)
def test_a_table_is_that_of_the_cpu(arguments, make_run, influence):
    agree(influence, make_run(), *arguments.split())


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model_gives_the_scores_of_the_cpu(name, make_run, influence):
    run = make_run(definition=OF_CASE.format(name=name), model=CASES[name].model)
    agree(influence, run, "score", "--precision", "float32", "--cache", "none")
    agree(influence, run, "score", "--precision", "float32")


@pytest.mark.parametrize("method", ["dve", "unroll"])
def test_scores_of_steps_are_those_of_the_cpu(method, tmp_path, influence):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    agree(influence, run, "score", "--method", method)
