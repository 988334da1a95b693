"""One unit of the cache: its name, and its rows as tensors of a safetensors file.

The format is in docs/cache-format.md. A unit file is complete or absent.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.quantize import pack, pack_side_by_side, unpack, unpack_side_by_side
from influence_cli.cache.verification import Verification
from influence_cli.errors import CacheError
from influence_cli.gradients.form_ops import from_tensors
from influence_cli.gradients.forms import Form, Projected
from influence_cli.gradients.row_products import ONEDNN_LINEAR
from influence_cli.storage.safetensors_io import TensorFile

Level = str  # "values": gradients and norms; "norms": norms alone
RowDecoder = Callable[[], GradientRows]  # makes rows of bytes that are already in memory
FORMS_KEY = "influence-unit"  # of the file's metadata: the forms as JSON
IDENTITY_KEY = "influence-identity"  # of the file's metadata: Unit.identity
SIDE_BY_SIDE = ":projected"  # the tensor that holds the projected gradients of all columns

# fewer than a quarter of a unit's examples are read row by row, if the forms have one row each and
# the file is large; a small one is read completely, and so can be compared with its checksums
ROWWISE_FRACTION = 4
ROWWISE_FROM = 1 << 20  # bytes
ROWWISE_FORMS = ("dense", "factors", "projected")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit file: columns at a level, for the examples start..stop, or for `ids` among them.

    `definition`: digest of the definition that it was captured under. `rows`: the file's rows of
    `ids`, where the file has more rows than that.
    """

    folder: Path
    name: str
    columns: tuple[str, ...]
    level: Level
    definition: str
    start: int
    stop: int
    ids: np.ndarray | None = None
    rows: np.ndarray | None = None

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def identity(self) -> str:
        """Settings, checkpoint, split, columns and name, which say what the content is."""
        parts = self.path.parts
        steps = [at for at, part in enumerate(parts) if part.startswith("step-")]
        return "/".join(parts[steps[-1] - 1 if steps else -2 :])

    @property
    def example_ids(self) -> np.ndarray:
        return np.arange(self.start, self.stop) if self.ids is None else self.ids

    def find_rows(self, ids: np.ndarray) -> np.ndarray:
        """The row of each example in the file; -1 where the unit lacks it."""
        if self.ids is None:
            return np.where((ids >= self.start) & (ids < self.stop), ids - self.start, -1)
        if not len(self.ids):
            return np.full(len(ids), -1)
        place = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return np.where(
            self.ids[place] == ids, place if self.rows is None else self.rows[place], -1
        )

    def keep_examples(self, mask: np.ndarray) -> "Unit":
        """The unit without the examples whose `mask` (over its own examples) is False."""
        return dataclasses.replace(self, ids=self.example_ids[mask], rows=np.flatnonzero(mask))


@dataclass(frozen=True)
class UnitContent:
    """What a unit's file holds: tensors and metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


# ---------------------------------------------------------------- writing
def encode_unit(unit: Unit, rows: GradientRows, storage_dtype: torch.dtype | None) -> UnitContent:
    """The content of a unit's file."""
    tensors: dict[str, Tensor] = {"losses": rows.losses, "digests": rows.digests}
    if unit.ids is not None:
        tensors["ids"] = torch.from_numpy(unit.ids)
    tensors |= {f"{column}:sqnorms": rows.sqnorms[column] for column in unit.columns}
    forms: dict[str, Any] = {}  # Any: JSON values
    if unit.level == "values":
        projected = {name: form for name, form in rows.forms.items() if isinstance(form, Projected)}
        if projected:
            values = [form.values for form in projected.values()]
            tensors |= pack_side_by_side(SIDE_BY_SIDE, values, storage_dtype)
        start = 0
        # (address, shape) -> name. Two gradients can be one tensor, which is written once:
        # a bias, and the left factors of its layer
        names: dict[tuple[int, torch.Size], str] = {}
        for column in unit.columns:
            if column in projected:
                stop = start + projected[column].values.shape[1]
                place = {"values": [SIDE_BY_SIDE, [start, stop]]}
                forms[column] = ["projected", list(projected[column].shape), place]
                start = stop
            else:
                form = rows.forms[column]
                packed, shared = encode_form(column, form, storage_dtype, names)
                tensors |= packed
                forms[column] = [form.kind, list(form.shape), shared]
    return UnitContent(tensors, {FORMS_KEY: json.dumps(forms), IDENTITY_KEY: unit.identity})


def decode_unit(unit: Unit, content: UnitContent) -> GradientRows:
    """All rows of a unit, as a read of its file would return them."""
    tensors = content.tensors
    columns = unit.columns if unit.level == "values" else ()
    layout = read_layout(content.metadata, tensors, columns)
    sqnorms = {column: tensors[f"{column}:sqnorms"] for column in unit.columns}
    forms = decode_forms(layout, tensors)
    ids = unit.example_ids
    return GradientRows(ids, tensors["losses"], tensors["digests"], sqnorms, forms)


def encode_form(
    column: str,
    form: Form,
    storage_dtype: torch.dtype | None,
    names: dict[tuple[int, torch.Size], str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # Any: JSON values
    """The tensors of a form, and where others are: part -> [name of the tensor, shape of a row].

    `names`: those that this unit already has; the new ones are added.
    """
    packed: dict[str, Tensor] = {}
    shared = {}
    for part, value in form.tensors().items():
        name = f"{column}:{part}"
        key = (value.data_ptr(), torch.Size([len(value), value[:1].numel()]))
        # tensors without numbers all have the address 0, and are written each
        first = names.setdefault(key, name) if value.numel() else name
        if first == name or not value.is_contiguous():
            packed |= pack(name, value, storage_dtype)
        else:
            shared[part] = [first, list(value.shape[1:])]
    return packed, shared


# ---------------------------------------------------------------- reading
@dataclass(frozen=True)
class TensorPlace:
    """Where a part of a form is. `row_shape`: where another column owns the tensor, the shape of
    this one's rows; with the name SIDE_BY_SIDE, the first and last position in a row."""

    name: str
    row_shape: list[int] | None = None


@dataclass(frozen=True)
class FormPlace:
    kind: str
    shape: list[int]
    parts: dict[str, TensorPlace]


@dataclass(frozen=True)
class UnitLayout:
    """Where a unit's file has the forms of some columns; `spans` of all projected columns."""

    forms: dict[str, FormPlace]
    spans: list[list[int]]

    @property
    def tensor_names(self) -> set[str]:
        return {place.name for form in self.forms.values() for place in form.parts.values()}

    @property
    def has_one_row_each(self) -> bool:
        return all(form.kind in ROWWISE_FORMS for form in self.forms.values())


def read_unit(unit: Unit, columns: Sequence[str], level: Level, ids: np.ndarray) -> GradientRows:
    """The rows of these examples of one unit, all compared with their checksums. Raises CacheError
    for a damaged file."""
    return fetch_unit(unit, columns, level, ids, Verification(always=True))()


def fetch_unit(
    unit: Unit, columns: Sequence[str], level: Level, ids: np.ndarray, verification: Verification
) -> RowDecoder:
    """Reads these examples from disk; returns a function that decodes them.

    Both raise CacheError for a damaged file, or for one that belongs to another place.
    """
    with open_tensor_file(unit.path) as file:
        if (identity := file.metadata.get(IDENTITY_KEY)) != unit.identity:
            raise ValueError(f"it belongs to {identity}, not to {unit.identity}")
        layout = read_layout(file.metadata, file.entries, columns if level == "values" else ())
        values = layout.tensor_names
        scales = {f"{name}.scale" for name in values} & set(file.entries)
        heads = {"losses", "digests", *(f"{column}:sqnorms" for column in columns)}
        count = file.entries["losses"].shape[0]
        rowwise = len(ids) < count / ROWWISE_FRACTION and layout.has_one_row_each
        # a checksum is over all rows
        rowwise &= not verification.always and file.size > ROWWISE_FROM
        # a unit with `rows` says nothing about its file's other rows
        expected = len(unit.example_ids) if unit.rows is None else count
        if any(
            file.entries[name].shape[0] != expected
            for name in (heads | values if rowwise else heads)
        ):
            raise ValueError(f"{count} rows for {expected} examples")
        rows = unit.find_rows(ids)
        if rowwise:
            complete = file.read(heads | scales)
            content = {name: value[rows] for name, value in complete.items()}
            parts = {name: file.read_rows(name, rows) for name in values}
            verification.skip(parts)
            content |= parts
        else:
            complete = content = file.read(heads | scales | values)
            verification.verify(file, {name: content[name] for name in values})
        file.verify({name: complete[name] for name in heads | scales})

    def decode() -> GradientRows:
        with report_damage(unit.path):
            forms = decode_forms(layout, content)
            if not rowwise and any(len(form) != expected for form in forms.values()):
                raise ValueError(f"gradients for other than its {expected} examples")
            sqnorms = {column: content[f"{column}:sqnorms"] for column in columns}
            losses, digests = content["losses"], content["digests"]
            if rowwise or len(ids) == expected:
                return GradientRows(ids, losses, digests, sqnorms, forms)
            all_rows = GradientRows(np.arange(expected), losses, digests, sqnorms, forms)
            return dataclasses.replace(all_rows.take(rows), ids=ids)

    return decode


def decode_forms(layout: UnitLayout, content: dict[str, Tensor]) -> dict[str, Form]:
    values = {
        name: unpack_side_by_side(content[name], content.get(f"{name}.scale"), layout.spans)
        if name == SIDE_BY_SIDE
        else unpack(content[name], content.get(f"{name}.scale"))
        for name in layout.tensor_names
    }
    values = {name: aligned(value) for name, value in values.items()}
    forms: dict[str, Form] = {}
    for column, form in layout.forms.items():
        tensors = {}
        for part, place in form.parts.items():
            value = values[place.name]
            if place.name == SIDE_BY_SIDE:
                assert place.row_shape is not None
                value = value[:, slice(*place.row_shape)]
            elif place.row_shape is not None:
                value = value.view(-1, *place.row_shape)
            tensors[part] = value
        forms[column] = from_tensors(form.kind, form.shape, tensors)
    return forms


def aligned(value: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 64, where MKL multiplies it: the last bits of
    its products depend on the address, which is another one in a file than in memory. float32
    rows of one position are multiplied by oneDNN, whose bits do not depend on it.
    """
    has_positions = value.ndim == 3 and value.shape[1] > 1
    by_mkl = value.dtype == torch.float64 or has_positions or not ONEDNN_LINEAR
    return value.clone() if by_mkl and value.data_ptr() % 64 else value


def read_layout(
    metadata: Mapping[str, str], names: Iterable[str], columns: Sequence[str]
) -> UnitLayout:
    """Where the forms of these columns are. `names`: of all tensors of the file."""
    heads = json.loads(metadata[FORMS_KEY])
    own: dict[str, dict[str, TensorPlace]] = {}
    for name in names:
        column, _, part = name.rpartition(":")
        if part != "sqnorms" and not part.endswith(".scale"):
            own.setdefault(column, {})[part] = TensorPlace(name)
    forms = {}
    for column in columns:
        kind, shape, shared = heads[column]
        others = {part: TensorPlace(name, row_shape) for part, (name, row_shape) in shared.items()}
        forms[column] = FormPlace(kind, shape, own.get(column, {}) | others)
    spans = [
        span
        for _, _, shared in heads.values()
        for name, span in shared.values()
        if name == SIDE_BY_SIDE
    ]
    return UnitLayout(forms, sorted(spans))


def read_ids(path: Path) -> np.ndarray:
    with open_tensor_file(path) as file:
        tensors = file.read(["ids"])
        file.verify(tensors)
        return tensors["ids"].numpy()


@contextmanager
def open_tensor_file(path: Path) -> Iterator[TensorFile]:
    """A file that influence wrote. Raises CacheError where it is damaged."""
    with report_damage(path), TensorFile(path) as file:
        yield file


@contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file causes into a CacheError."""
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CacheError(
            f"the cache file {path} is damaged",
            f"found: {type(error).__name__} {error}",
            "delete it, and re-run the command to recompute its content",
        ) from error
