"""A first `score` computes, stores and scores in one pass; its bytes are those of a later one."""

import numpy as np
import pytest
import torch

from influence_cli.cache import unit_index
from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.store import Store
from influence_cli.cache.unit_file import read_unit
from influence_cli.errors import CacheError
from influence_cli.extraction import memory_budget
from influence_cli.gradients.forms import Factors
from tests.cases import CASES
from tests.methods.test_tracin import OF_CASE

FLAGS = (
    "",
    "--store float16",
    "--store int8",
    "--precision float64",
    "--precision float64 --store float32",
    "--project 8",
    "--project 8 --store int8",
    "--normalize",
    "--by layer",
    "--by checkpoint",
    "--group-by label",
    "--train 0,3,7,9,12,15,16,19",
    "--layers 2",
)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(memory_budget, "UNIT_EXAMPLES", 8)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The units of training examples that were read from disk."""
    paths, fetch = [], unit_index.fetch_unit

    def counting(unit, columns, level, *rest):
        if "train" in unit.path.parts and level == "values":
            paths.append(unit.name)
        return fetch(unit, columns, level, *rest)

    monkeypatch.setattr(unit_index, "fetch_unit", counting)
    return paths


@pytest.mark.parametrize("flags", FLAGS)
def test_first_and_later_runs_give_the_same_bytes(flags, make_run, influence, reads):
    run = make_run()
    first = influence("score", run, "--top", "all", *flags.split())
    assert first.code == 0, first.err
    assert reads == []
    again = influence("score", run, "--top", "all", *flags.split())
    assert reads
    assert again.out == first.out


@pytest.mark.parametrize("flags", ["--sum-queries", "--queries 0", "--normalize", ""])
@pytest.mark.parametrize("name", ["positions", "reused", "encoder", "lstm"])
def test_first_and_later_runs_of_factors_give_the_same_bytes(
    name, flags, make_run, influence, reads
):
    run = make_run(definition=OF_CASE.format(name=name), model=CASES[name].model)
    command = "score", run, "--top", "all", "--precision", "float32", *flags.split()
    first = influence(*command)
    assert first.code == 0, first.err
    again = influence(*command)
    assert reads
    assert again.out == first.out


@pytest.mark.parametrize(("shape", "is_aligned"), [((5, 3, 7), True), ((5, 1, 7), False)])
def test_factors_of_several_positions_are_read_aligned(shape, is_aligned, tmp_path):
    """Products by MKL depend on the address of a tensor in their last bits."""
    generator = torch.Generator().manual_seed(0)
    form = Factors((7, 7), *(torch.randn(shape, generator=generator) for _ in range(2)))
    losses, ids = torch.zeros(5, dtype=torch.float64), np.arange(5)
    rows = GradientRows(ids, losses, losses.long(), {"w": form.sqnorm()}, {"w": form})
    store = Store(tmp_path / "cache")
    unit = store.unit_for(tmp_path / "cache" / "s" / "step-0", ["w"], "values", "d", 0, 5, ids)
    store.write(unit, rows, torch.float32)
    tensors = read_unit(unit, ["w"], "values", ids).forms["w"].tensors()
    assert all(value.data_ptr() % 64 == 0 for value in tensors.values()) == is_aligned


@pytest.mark.parametrize("stop", range(6))
def test_a_run_that_stops_at_any_unit_is_resumed_with_the_same_bytes(
    stop, make_run, influence, monkeypatch, reads
):
    whole = influence("score", make_run("whole"), "--top", "all").out
    run, written, write = make_run(), [], Store.write_content

    def stopping(self, unit, *rest):
        if "train" in unit.path.parts:
            if len(written) == stop:
                raise KeyboardInterrupt
            written.append(unit.path)
        write(self, unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_content", stopping)
        assert influence("score", run, "--top", "all").code != 0
    assert sum("train" in path.parts for path in run.rglob("*.safetensors")) == stop
    reads.clear()
    resumed = influence("score", run, "--top", "all")
    assert resumed.out == whole
    assert len(reads) == stop


def test_a_unit_that_the_cache_has_in_part_is_read_with_the_rest(make_run, influence):
    run = make_run()
    influence("cache", run, "--layers", "0")
    influence("cache", run, "--train", "9,11", "--steps", "20")
    pieced = influence("score", run, "--top", "all")
    whole = influence("score", make_run("whole"), "--top", "all")

    def scores(result):
        return {(r["query"], r["train"]): float(r["score"]) for r in result.rows}

    pieces, expected = scores(pieced), scores(whole)
    largest = max(map(abs, expected.values()))
    assert max(abs(pieces[key] - expected[key]) for key in expected) < 1e-6 * largest
    assert influence("score", run, "--top", "all").out == pieced.out


def test_a_full_disk_at_the_last_unit_is_an_error(make_run, influence, monkeypatch):
    run, write = make_run(), Store.write_content

    def failing(self, unit, *rest):
        if "train" in unit.path.parts and unit.start == 16 and "step-000000020" in str(unit.path):
            raise CacheError("the disk is full")
        write(self, unit, *rest)

    monkeypatch.setattr(Store, "write_content", failing)
    result = influence("score", run, "-o", run / "table.csv")
    assert result.code == 1
    assert not (run / "table.csv").exists()
