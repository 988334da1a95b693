"""The files of the cache: what is written is what is read, whatever the store and however units overlap."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from influence_cli.cache import store as store_module
from influence_cli.cache import unit_file
from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.quantize import pack, unpack
from influence_cli.cache.store import Store
from influence_cli.cache.unit_index import UnitIndex
from influence_cli.errors import CacheError
from influence_cli.gradients.form_ops import side_by_side, smallest
from influence_cli.gradients.forms import Dense, Factors, Projected
from influence_cli.storage.safetensors_io import TensorFile


def rows(ids, seed=0) -> GradientRows:
    """GradientRows whose numbers follow from the example id, so that any order of reading can be checked."""
    ids = np.asarray(ids)
    values = torch.stack(
        [torch.randn(3, 4, generator=torch.Generator().manual_seed(int(i))) for i in ids]
    )
    sparse = torch.stack(
        [torch.randn(50, 2, generator=torch.Generator().manual_seed(int(i))) for i in ids]
    )
    sparse[:, 3:] = 0
    forms = {"a": Dense((3, 4), values.flatten(1)), "b": smallest(sparse, embedding=True)}
    at = torch.from_numpy(ids)
    return GradientRows(
        ids, at.double() / 10, at * 7, {name: form.sqnorm() for name, form in forms.items()}, forms
    )


def same(found: GradientRows, expected: GradientRows) -> None:
    assert found.ids.tolist() == expected.ids.tolist()
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.digests, expected.digests)
    for name in found.sqnorms:
        assert torch.equal(found.sqnorms[name], expected.sqnorms[name])
    for name in found.forms:
        assert torch.equal(found.forms[name].dense().values, expected.forms[name].dense().values)


def test_a_unit_round_trips_bit_for_bit(tmp_path):
    store = Store(tmp_path / "c")
    unit = store.unit_for(store.folder / "x", ["a", "b"], "values", "digest", 0, 8, np.arange(8))
    store.write(unit, rows(range(8)), torch.float32)
    held = store.index_units(store.folder / "x")
    same(held.read_rows(["a", "b"], "values", np.arange(8)), rows(range(8)))
    same(held.read_rows(["b"], "values", np.array([2, 5])), rows([2, 5]))
    assert held.read_rows(["a"], "norms", np.array([2])).forms == {}


@pytest.mark.parametrize("count", [7, 8])
def test_float64_numbers_have_the_same_place_in_memory_written_and_read(count, tmp_path):
    """The last bits of their products depend on it."""
    store, ids = Store(tmp_path / "c"), np.arange(count)
    unit = store.unit_for(store.folder / "x", ["a", "b"], "values", "digest", 0, count, ids)
    made = rows(ids)
    wide = {name: form.to(torch.device("cpu"), torch.float64) for name, form in made.forms.items()}
    with store.writer(torch.float64, 0) as writer:
        written = writer.write_and_decode(unit, dataclasses.replace(made, forms=wide))
    read = store.index_units(store.folder / "x").read_rows(["a", "b"], "values", ids)
    same(read, written)
    for decoded in (read, written):
        for form in decoded.forms.values():
            assert form.tensors()["values"].dtype == torch.float64
            assert form.tensors()["values"].data_ptr() % 64 == 0


def test_every_form_is_kept_in_its_own_form(tmp_path):
    store = Store(tmp_path / "c")
    forms = {
        "dense": Dense((2, 3), torch.randn(4, 6)),
        "factors": Factors((2, 3), torch.randn(4, 5, 2), torch.randn(4, 5, 3)),
        "projected": Projected((2, 3), torch.randn(4, 2)),
        "rows": rows(range(4)).forms["b"],
    }
    norms = {name: form.sqnorm() for name, form in forms.items()}
    unit = store.unit_for(store.folder / "x", list(forms), "values", "digest", 0, 4, np.arange(4))
    store.write(
        unit, GradientRows(np.arange(4), torch.zeros(4), torch.zeros(4), norms, forms), None
    )
    again = (
        store.index_units(store.folder / "x").read_rows(list(forms), "values", np.arange(4)).forms
    )
    for name, form in forms.items():
        assert again[name].kind == form.kind == name
        assert torch.equal(again[name].dense().values, form.dense().values)


def test_units_that_overlap_are_read_as_one(tmp_path):
    """Other columns, other ranges, single examples: each cell is found once, in the order asked for."""
    store = Store(tmp_path / "c")
    place = store.folder / "x"
    for columns, start, stop, ids in [
        (["a", "b"], 0, 8, [1, 4, 6]),
        (["a"], 0, 16, range(16)),
        (["b"], 0, 8, [0, 2, 3, 5, 7]),
        (["b"], 8, 16, range(8, 16)),
    ]:
        ids = np.asarray(ids)
        store.write(
            store.unit_for(place, columns, "values", "digest", start, stop, ids),
            rows(ids),
            torch.float32,
        )
    held = store.index_units(place)
    for ids in (np.arange(16), np.array([0, 1, 5, 6, 9]), np.array([15])):
        same(held.read_rows(["a", "b"], "values", ids), rows(ids))
    assert (held.locate("a", "values", np.arange(20)) >= 0).tolist() == [True] * 16 + [False] * 4


def test_norms_are_found_in_every_unit_and_values_only_where_they_are(tmp_path):
    store = Store(tmp_path / "c")
    unit = store.unit_for(store.folder / "x", ["a"], "norms", "digest", 0, 4, np.arange(4))
    store.write(unit, rows(range(4)), torch.float32)
    held = store.index_units(store.folder / "x")
    assert (held.locate("a", "norms", np.arange(4)) >= 0).all()
    assert (held.locate("a", "values", np.arange(4)) < 0).all()


def test_the_same_unit_has_the_same_name_and_bytes(tmp_path):
    contents = []
    for name in ("one", "two"):
        store = Store(tmp_path / name)
        unit = store.unit_for(
            store.folder / "x", ["a", "b"], "values", "digest", 0, 8, np.array([1, 2, 5])
        )
        store.write(unit, rows([1, 2, 5]), torch.float16)
        contents.append((unit.path.relative_to(store.folder), unit.path.read_bytes()))
    assert contents[0] == contents[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_scale_of_each_row(dtype):
    """Values of 1e-12 and of 1e12 side by side: each row is right to the precision, relative to its largest."""
    values = torch.randn(4, 100) * torch.tensor([1e-12, 1.0, 1e12, 0.0])[:, None]
    stored = pack("x", values, dtype)
    again = unpack(stored["x"], stored["x.scale"])
    limit = values.abs().amax(1) * torch.finfo(dtype).eps
    assert ((again - values).abs().amax(1) <= limit).all()
    assert stored["x"].dtype == dtype
    assert stored["x.scale"].dtype == torch.float32


def test_gradients_that_share_one_storage_are_written(tmp_path):
    """Two broadcast parameters have the same gradient tensor."""
    store, one = Store(tmp_path / "c"), torch.randn(4, 3)
    forms = {name: Dense((3,), one) for name in "pq"}
    unit = store.unit_for(store.folder / "x", ["p", "q"], "values", "digest", 0, 4, np.arange(4))
    norms = {name: form.sqnorm() for name, form in forms.items()}
    store.write(
        unit,
        GradientRows(np.arange(4), torch.zeros(4), torch.zeros(4), norms, forms),
        torch.float32,
    )
    again = store.index_units(store.folder / "x").read_rows(["p", "q"], "values", np.arange(4))
    assert torch.equal(again.forms["q"].dense().values, one)


def test_a_row_below_any_scale_becomes_zero_not_nan():
    stored = pack("x", torch.full((2, 3), 2e-50, dtype=torch.float64), torch.float16)
    assert (unpack(stored["x"], stored["x.scale"]) == 0).all()
    assert pack("x", torch.empty(0, 4), torch.float16)["x"].shape == (0, 4)


def test_a_cache_begun_by_another_process_is_joined(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".gitignore").write_text("*")
    (tmp_path / "c" / ".tmp-host-1-cache.json").touch()
    assert Store(tmp_path / "c").folder.is_dir()


@pytest.mark.parametrize("writer", ["write_text", "write_json"])
def test_a_killed_creation_is_completed(writer, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store_module, writer, interrupt)
        Store(tmp_path)
    Store(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "cache.json"]


def test_a_cache_that_vanishes_during_the_work_is_not_begun_without_its_head(tmp_path):
    store = Store(tmp_path / "c")
    unit = store.unit_for(store.folder / "x", ["a", "b"], "values", "digest", 0, 8, np.arange(8))
    shutil.rmtree(store.folder)
    with pytest.raises(CacheError, match="removed during the work"):
        store.write(unit, rows(range(8)), torch.float32)
    assert not store.folder.exists()
    Store(tmp_path / "c").write(unit, rows(range(8)), torch.float32)  # the command again


def test_rows_that_vanished_are_an_error_and_no_row_of_another_example(tmp_path):
    store = Store(tmp_path / "c")
    unit = store.unit_for(store.folder / "x", ["a", "b"], "values", "digest", 0, 8, np.arange(8))
    store.write(unit, rows(range(8)), torch.float32)
    shutil.rmtree(store.folder)
    with pytest.raises(CacheError, match="no gradients of a any more"):
        store.index_units(store.folder / "x").read_rows(["a"], "values", np.arange(8))


def test_an_empty_cache_holds_nothing():
    assert (UnitIndex([]).locate("a", "values", np.arange(3)) == -1).all()


@pytest.mark.parametrize("store_as", [torch.float32, torch.float16], ids=str)
def test_few_rows_of_a_unit_are_read_row_by_row_and_are_the_same(store_as, tmp_path, monkeypatch):
    store = Store(tmp_path / "c")
    forms = {
        "dense": Dense((2, 3), torch.randn(40, 6)),
        "factors": Factors((2, 3), torch.randn(40, 5, 2), torch.randn(40, 5, 3)),
    }
    norms = {name: form.sqnorm() for name, form in forms.items()}
    unit = store.unit_for(store.folder / "x", list(forms), "values", "digest", 0, 40, np.arange(40))
    store.write(
        unit,
        GradientRows(np.arange(40), torch.arange(40.0), torch.arange(40), norms, forms),
        store_as,
    )
    held = store.index_units(store.folder / "x")
    few, whole = np.array([3, 4, 5, 17, 39]), held.read_rows(list(forms), "values", np.arange(40))
    rowwise: list[str] = []
    original = TensorFile.read_rows
    monkeypatch.setattr(
        TensorFile,
        "read_rows",
        lambda self, name, rows: rowwise.append(name) or original(self, name, rows),
    )
    same(held.read_rows(list(forms), "values", few), whole.take(few))
    assert not rowwise  # a small file is read completely
    monkeypatch.setattr(unit_file, "ROWWISE_FROM", 0)
    same(held.read_rows(list(forms), "values", few), whole.take(few))
    assert rowwise


def test_few_rows_of_word_gradients_are_read_from_the_complete_file(tmp_path, monkeypatch):
    """Their tensors have several rows per example, or none."""
    monkeypatch.setattr(unit_file, "ROWWISE_FROM", 0)
    store, ids = Store(tmp_path / "c"), np.arange(40)
    unit = store.unit_for(store.folder / "x", ["a", "b"], "values", "digest", 0, 40, ids)
    store.write(unit, rows(ids), torch.float32)
    few = np.array([3, 17, 39])
    same(store.index_units(store.folder / "x").read_rows(["a", "b"], "values", few), rows(few))


def test_a_row_past_the_end_of_a_damaged_file_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_file, "ROWWISE_FROM", 0)
    store = Store(tmp_path / "c")
    form = Dense((2, 3), torch.randn(40, 6))
    unit = store.unit_for(store.folder / "x", ["a"], "values", "digest", 0, 40, np.arange(40))
    store.write(
        unit,
        GradientRows(
            np.arange(40), torch.zeros(40), torch.zeros(40), {"a": form.sqnorm()}, {"a": form}
        ),
        None,
    )
    held = store.index_units(store.folder / "x")
    unit.path.write_bytes(unit.path.read_bytes()[:-8])
    with pytest.raises(CacheError, match="is damaged"):
        held.read_rows(["a"], "values", np.array([39]))


@pytest.mark.parametrize(
    ("store", "allowed"),
    [(torch.float32, 0.0), (torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.int8, 1 / 250)],
)
def test_projected_columns_stand_side_by_side_each_with_its_own_scale(store, allowed, tmp_path):
    """Whole, a column of them, and a few rows of a large unit; numbers of 1e-12 beside numbers of 1."""
    torch.manual_seed(0)
    cache, names, sizes = Store(tmp_path / "c"), ["a", "tiny", "c"], [4, 7, 2]
    values = [
        torch.randn(64, size) * scale for size, scale in zip(sizes, (1, 1e-12, 1e3), strict=True)
    ]
    forms = {name: Projected((9, 9), value) for name, value in zip(names, values, strict=True)}
    unit = cache.unit_for(cache.folder / "x", names, "values", "digest", 0, 64, np.arange(64))
    ones = torch.ones(64, dtype=torch.float64)
    cache.write(
        unit,
        GradientRows(np.arange(64), ones, ones.long(), dict.fromkeys(names, ones), forms),
        store,
    )
    held = cache.index_units(cache.folder / "x")
    for columns in (names, ["tiny"], ["c", "a"]):
        for ids in (np.arange(64), np.array([3, 60]), np.arange(10, 50)):
            found = held.read_rows(columns, "values", ids).forms
            assert list(found) == columns
            for name in columns:
                expected = values[names.index(name)][torch.from_numpy(ids)]
                largest = expected.abs().amax(1, keepdim=True)
                assert found[name].dense().values.shape == expected.shape
                assert bool(
                    ((found[name].dense().values - expected).abs() <= allowed * largest).all()
                ), name
    everything = held.read_rows(names, "values", np.arange(64)).forms
    together = side_by_side([everything[name] for name in names])
    assert (
        together is not None
        and together.dense().values.data_ptr() == everything["a"].dense().values.data_ptr()
    )
    assert torch.equal(
        together.dense().values,
        torch.cat([everything[name].dense().values for name in names], dim=1),
    )
    assert side_by_side([everything["c"], everything["a"]]) is None
    assert side_by_side([forms["a"], forms["c"]]) is None
    part = side_by_side([everything[name].part(slice(8, 24)) for name in names])
    assert part is not None and torch.equal(part.dense().values, together.dense().values[8:24])


def test_a_folder_that_lost_its_listing_is_told_again(make_run, influence):
    """Its units are captured no second time for ever: what they hold is said where the writer finds them."""
    run = make_run()
    assert influence("cache", run).code == 0
    listings = sorted((run / ".influence").glob("*/*/train/*/columns.json"))
    texts = [path.read_text() for path in listings]
    for path in listings:
        path.unlink()
    assert influence("cache", run).code == 0
    assert listings and [path.read_text() for path in listings] == texts
    assert influence("score", run).code == 0
