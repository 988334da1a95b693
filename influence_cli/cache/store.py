"""The cache on disk: units of rows as safetensors files under names that follow from what they hold. See docs/cache-format.md.

.influence/cache.json                                      format and version
.influence/<settings>/<checkpoint>/<split>/<columns>/      one folder per set of columns, listed in its columns.json
    000000000000-000000000512.safetensors                  a unit: these examples, whole or not at all
    000000000000-000000000512-1f0c9a3e.safetensors         a unit of some examples of that range, named by their digest
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.quantize import pack, pack_side_by_side, unpack, unpack_side_by_side
from influence_cli.errors import CacheError
from influence_cli.gradients.form_ops import concat, from_tensors
from influence_cli.gradients.forms import Form, Projected
from influence_cli.storage.atomic import read_json, report_disk_errors, write_json, write_text
from influence_cli.storage.safetensors_io import TensorFile, write_tensors

FORMAT, VERSION = "influence-cache", 2
UNIT_BYTES = (
    128 << 20
)  # a unit's gradients; what a kill costs at most, and what a reader holds at once
UNIT_EXAMPLES = 4096
DIRECT_FROM = 1 << 30  # bytes written in one go from which the page cache is left to others
FEW, ROWWISE = (
    4,
    ("dense", "factors", "projected"),
)  # less than a quarter of a unit's examples is read row by row, in forms that allow it
NAME = re.compile(r"(\d{12})-(\d{12})(-[0-9a-f]{8})?\.safetensors")  # of a unit
BESIDE = ":projected"  # the tensor in which projected gradients of all columns stand side by side
Level = str  # "values": gradients and norms; "norms": norms alone


@dataclass(frozen=True)
class GradientRows:
    """Some examples at one checkpoint: ids (N,), losses (N,) and squared norms (N,) float64, gradients per column (where asked for)."""

    ids: np.ndarray
    losses: Tensor
    digests: Tensor
    sqnorms: dict[str, Tensor]
    forms: dict[str, Form]

    def parts(self, size: int) -> "Iterator[GradientRows]":
        """The rows a few at a time, as views of the same memory wherever the form allows."""
        for first in range(0, len(self.ids), size):
            at = slice(first, first + size)
            norms = {name: value[at] for name, value in self.sqnorms.items()}
            forms = {name: form.part(at) for name, form in self.forms.items()}
            yield GradientRows(self.ids[at], self.losses[at], self.digests[at], norms, forms)

    def take(self, index: np.ndarray) -> "GradientRows":
        at = torch.from_numpy(index)
        forms = {name: form.take(at) for name, form in self.forms.items()}
        return GradientRows(
            self.ids[index],
            self.losses[at],
            self.digests[at],
            {name: value[at] for name, value in self.sqnorms.items()},
            forms,
        )


def concat_rows(parts: Sequence[GradientRows]) -> GradientRows:
    """Parts of the same columns, one after the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return GradientRows(
        np.concatenate([part.ids for part in parts]),
        torch.cat([part.losses for part in parts]),
        torch.cat([part.digests for part in parts]),
        {name: torch.cat([part.sqnorms[name] for part in parts]) for name in first.sqnorms},
        {name: concat([part.forms[name] for part in parts]) for name in first.forms},
    )


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit file: the columns at a level for the examples start..stop, or those of `ids` where it holds some of them only.

    `definition`: digest of what it was captured under. `rows`: where not all rows of the file count, the rows of `ids` in it.
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
    def held_ids(self) -> np.ndarray:
        return np.arange(self.start, self.stop) if self.ids is None else self.ids

    def position(self, ids: np.ndarray) -> np.ndarray:
        """Row in the file of each of these examples, -1 where it is not there."""
        if self.ids is None:
            return np.where((ids >= self.start) & (ids < self.stop), ids - self.start, -1)
        if not len(self.ids):
            return np.full(len(ids), -1)
        place = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return np.where(
            self.ids[place] == ids, place if self.rows is None else self.rows[place], -1
        )

    def only(self, kept: np.ndarray) -> "Unit":
        """The unit without the examples for which `kept`, a mask over its own, is False."""
        return dataclasses.replace(self, ids=self.held_ids[kept], rows=np.flatnonzero(kept))


class Store:
    """An opened cache folder. Writers need no lock: a unit's name follows from its content, and it appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """Open, or begin, a cache. Raises CacheError: not a cache, another version, a folder that can't be written."""
        self.folder = folder
        head = folder / "cache.json"
        if head.is_file():
            found = read_json(head)
            if found.get("format") != FORMAT:
                raise CacheError(
                    f"{folder} is not an influence cache",
                    f"cache.json says {found.get('format')!r}",
                    "--cache DIR names another place",
                )
            if found.get("version") != VERSION:
                raise CacheError(
                    f"the cache {folder} is of version {found.get('version')!r}",
                    f"this influence reads and writes version {VERSION}",
                    "--cache DIR names another place; deleting the folder starts afresh",
                )
            return
        begun = (".tmp-", ".gitignore")  # by another process, or by one that was killed
        if folder.is_dir() and any(not path.name.startswith(begun) for path in folder.iterdir()):
            raise CacheError(
                f"{folder} is not an influence cache: it holds other files",
                "--cache DIR names an empty or a new folder",
            )
        with report_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(head, {"format": FORMAT, "version": VERSION})
            write_text(folder / ".gitignore", "*\n")

    # ------------------------------------------------------------ what is there
    def held(self, place: Path) -> "UnitIndex":
        """The units of one (settings, checkpoint, split) folder, in the order of their names."""
        found: list[Unit] = []
        for folder in (
            sorted(path for path in place.glob("*") if path.is_dir()) if place.is_dir() else ()
        ):
            listing = folder / "columns.json"
            if not listing.is_file():
                continue  # begun and killed before its first unit
            head = read_json(listing)
            if (
                not isinstance(head.get("columns"), list)
                or head.get("level") not in ("values", "norms")
                or "definition" not in head
            ):
                raise CacheError(
                    f"{listing} does not list columns, level and definition",
                    "delete that folder; it is computed again",
                )
            columns, level, definition = tuple(head["columns"]), head["level"], head["definition"]
            for name in sorted(os.listdir(folder)):
                if match := NAME.fullmatch(name):
                    ids = read_ids(folder / name) if match[3] else None
                    found.append(
                        Unit(
                            folder,
                            name,
                            columns,
                            level,
                            definition,
                            int(match[1]),
                            int(match[2]),
                            ids,
                        )
                    )
        return UnitIndex(found)

    # ------------------------------------------------------------ writing
    def unit_for(
        self,
        place: Path,
        columns: Sequence[str],
        level: Level,
        definition: str,
        start: int,
        stop: int,
        ids: np.ndarray,
    ) -> Unit:
        """The unit that would hold these examples of start..stop; its name says so."""
        folder = (
            place
            / hashlib.sha256(json.dumps([list(columns), level, definition]).encode()).hexdigest()[
                :12
            ]
        )
        name, some = f"{start:012d}-{stop:012d}", None
        if len(ids) < stop - start:
            name, some = (
                f"{name}-{hashlib.sha256(ids.astype('<i8').tobytes()).hexdigest()[:8]}",
                ids,
            )
        return Unit(
            folder, f"{name}.safetensors", tuple(columns), level, definition, start, stop, some
        )

    def write(
        self, unit: Unit, rows: GradientRows, store: torch.dtype | None, direct: bool = False
    ) -> None:
        """Write a unit: temporary name, sync, rename. `direct`: past the page cache. Raises CacheError for a full or read-only disk."""
        tensors: dict[str, Tensor] = {"losses": rows.losses, "digests": rows.digests}
        if unit.ids is not None:
            tensors["ids"] = torch.from_numpy(unit.ids)
        forms: dict[str, Any] = {}
        owners: dict[
            tuple[int, torch.Size], str
        ] = {}  # two gradients may be one tensor (a bias and its layer's left factors): kept once
        thin = (
            {name: form for name, form in rows.forms.items() if isinstance(form, Projected)}
            if unit.level == "values"
            else {}
        )
        if thin:
            tensors |= pack_side_by_side(BESIDE, [form.values for form in thin.values()], store)
        start = 0
        for column in unit.columns:
            tensors[f"{column}:sqnorms"] = rows.sqnorms[column]
            if column in thin:
                width = thin[column].values.shape[1]
                forms[column] = [
                    "projected",
                    list(thin[column].shape),
                    {"values": [BESIDE, [start, start + width]]},
                ]
                start += width
            elif unit.level == "values":
                form, shared = rows.forms[column], {}
                for part, value in form.tensors().items():
                    name = f"{column}:{part}"
                    owner = owners.setdefault(
                        (value.data_ptr(), torch.Size([len(value), value[:1].numel()])), name
                    )
                    if owner == name or not value.is_contiguous():
                        tensors |= pack(name, value, store)
                    else:
                        shared[part] = [owner, list(value.shape[1:])]
                forms[column] = [form.kind, list(form.shape), shared]
        with report_disk_errors(self.folder):
            unit.path.parent.mkdir(parents=True, exist_ok=True)
            self.list_columns(unit)
            write_tensors(unit.path, tensors, {"influence-unit": json.dumps(forms)}, direct)

    def list_columns(self, unit: Unit) -> None:
        """Say what the unit's folder holds, where that is not said yet."""
        if not (unit.folder / "columns.json").is_file():
            with report_disk_errors(self.folder):
                write_json(
                    unit.folder / "columns.json",
                    {
                        "columns": list(unit.columns),
                        "level": unit.level,
                        "definition": unit.definition,
                    },
                )

    @contextmanager
    def writer(
        self, store: torch.dtype | None, size: int = 0
    ) -> Iterator[Callable[[Unit, GradientRows], None]]:
        """Yields a `write` that returns while the disk works: one unit is written while the next is computed. All are there at the end.

        `size`: bytes that will be written in all; many go past the page cache.
        """
        with ThreadPoolExecutor(1) as thread:
            pending: list[Future[None]] = []

            def write(unit: Unit, rows: GradientRows) -> None:
                while pending:
                    pending.pop().result()
                pending.append(thread.submit(self.write, unit, rows, store, size > DIRECT_FROM))

            yield write
            while pending:
                pending.pop().result()


class UnitIndex:
    """Units that are there, and which of them holds what."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = tuple(units)
        starts, stops = (
            np.array([(unit.start, unit.stop) for unit in units], dtype=np.int64).reshape(-1, 2).T
        )
        self._order = np.argsort(starts, kind="stable")
        self._starts = starts[self._order]
        self._reach = np.maximum.accumulate(
            stops[self._order]
        )  # how far any of the units up to this one goes
        self._kinds = {(unit.columns, unit.level) for unit in units}
        self._whole: dict[
            tuple[tuple[str, ...], Level], tuple[np.ndarray, np.ndarray]
        ] = {}  # starts and stops of units of all of a range
        for kind in self._kinds:
            whole = sorted(
                (unit.start, unit.stop)
                for unit in units
                if unit.ids is None and (unit.columns, unit.level) == kind
            )
            if whole:
                found = np.array(whole, dtype=np.int64)
                self._whole[kind] = found[:, 0], found[:, 1]

    def touches(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Of each range of examples low..high: whether a unit may have any of them."""
        last = np.searchsorted(self._starts, high) - 1  # that begins before the range ends
        return (
            (last >= 0) & (self._reach[last] > low)
            if len(self.units)
            else np.zeros(len(low), dtype=bool)
        )

    def covers(
        self, columns: Sequence[str], level: Level, low: np.ndarray, high: np.ndarray
    ) -> np.ndarray:
        """Of each range: whether a single unit surely holds these columns of all of it."""
        found = np.zeros(len(low), dtype=bool)
        for (theirs, their_level), (starts, stops) in self._whole.items():
            if set(columns) <= set(theirs) and level in (their_level, "norms"):
                last = np.searchsorted(starts, low, side="right") - 1
                found |= (last >= 0) & (stops[last] >= high)
        return found

    def where(self, column: str, level: Level, ids: np.ndarray) -> np.ndarray:
        """For each of these (rising) ids the number of the first unit that holds the column at this level, or -1.

        Norms are in every unit.
        """
        found = np.full(len(ids), -1)
        if not len(ids) or not self.units:
            return found
        last = np.searchsorted(self._starts, ids[-1], side="right")
        first = np.searchsorted(self._reach, ids[0], side="right")  # no unit before it goes so far
        for number in np.sort(self._order[first:last]):
            unit = self.units[number]
            if column in unit.columns and level in (unit.level, "norms"):
                found = np.where((found < 0) & (unit.position(ids) >= 0), number, found)
        return found

    def read(self, columns: Sequence[str], level: Level, ids: np.ndarray) -> GradientRows:
        """The rows of these examples, in this order, gathered from whichever units hold them; all must be there."""
        return self.fetch(columns, level, ids)()

    def fetch(self, columns: Sequence[str], level: Level, ids: np.ndarray) -> "Fetched":
        """Reads them from disk, and gives a function that makes rows of what was read."""
        groups: dict[bytes, list[str]] = {}  # columns that are found in the same units
        alike = len(self._kinds) == 1 and set(columns) <= set(self.units[0].columns)
        first = self.where(columns[0], level, ids).tobytes() if alike else b""
        for column in columns:
            groups.setdefault(first or self.where(column, level, ids).tobytes(), []).append(column)
        fetched: list[tuple[list[np.ndarray], list[Fetched]]] = []
        for key, members in groups.items():
            place = np.frombuffer(key, dtype=np.int64)
            assert (place >= 0).all(), f"{members[0]}: read before it was ensured"
            rows = [np.flatnonzero(place == number) for number in np.unique(place)]
            fetched.append(
                (
                    rows,
                    [fetch_unit(self.units[place[at[0]]], members, level, ids[at]) for at in rows],
                )
            )

        def finished() -> GradientRows:
            gathered = []
            for rows, parts in fetched:
                part = concat_rows([finish() for finish in parts])
                gathered.append(
                    part if len(rows) == 1 else part.take(np.argsort(np.concatenate(rows)))
                )
            sqnorms = {name: part.sqnorms[name] for part in gathered for name in part.sqnorms}
            forms = {name: part.forms[name] for part in gathered for name in part.forms}
            return GradientRows(ids, gathered[0].losses, gathered[0].digests, sqnorms, forms)

        return finished


def read_unit(unit: Unit, columns: Sequence[str], level: Level, ids: np.ndarray) -> GradientRows:
    """These examples of one unit. Raises CacheError for a damaged file."""
    return fetch_unit(unit, columns, level, ids)()


def fetch_unit(unit: Unit, columns: Sequence[str], level: Level, ids: np.ndarray) -> "Fetched":
    """Reads them from disk, and gives a function that makes numbers of what was read. Raises CacheError for a damaged file, as that may."""
    with reading(unit.path) as file:
        sources, places = sources_of(file, columns) if level == "values" else ({}, [])
        norms = {column: f"{column}:sqnorms" for column in columns}
        stored = {name for _, _, parts in sources.values() for name, _ in parts.values()}
        scales = {f"{name}.scale" for name in stored} & set(file.entries)
        heads = {"losses", "digests", *norms.values()}
        count, rows = file.entries["losses"].shape[0], unit.position(ids)
        held = (
            unit.held_ids if unit.rows is None else np.arange(count)
        )  # ids of rows that don't count are not asked for
        few = len(ids) < count / FEW and all(kind in ROWWISE for kind, _, _ in sources.values())
        if any(
            file.entries[name].shape[0] != len(held) for name in (heads | stored if few else heads)
        ):
            raise ValueError(f"{count} rows for {len(held)} examples")
        content = file.read(heads | scales if few else heads | scales | stored)
        if few:
            content = {name: value[rows] for name, value in content.items()} | {
                name: file.read_rows(name, rows) for name in stored
            }

    def finished() -> GradientRows:
        with damaged(unit.path):
            values = {
                name: unpack(content[name], content.get(f"{name}.scale"))
                for name in stored - {BESIDE}
            }
            if BESIDE in stored:
                values[BESIDE] = unpack_side_by_side(
                    content[BESIDE], content.get(f"{BESIDE}.scale"), places
                )
            forms: dict[str, Form] = {}
            for column, (kind, shape, parts) in sources.items():
                tensors = {}
                for part, (name, tail) in parts.items():
                    if tail is None:
                        tensors[part] = values[name]
                    else:
                        tensors[part] = (
                            values[name][:, slice(*tail)]
                            if name == BESIDE
                            else values[name].view(-1, *tail)
                        )
                forms[column] = from_tensors(kind, shape, tensors)
            if not few and any(len(form) != len(held) for form in forms.values()):
                raise ValueError(f"gradients for other than its {len(held)} examples")
            sqnorms = {column: content[name] for column, name in norms.items()}
            found = GradientRows(
                ids if few else held, content["losses"], content["digests"], sqnorms, forms
            )
            return (
                found
                if few
                else dataclasses.replace(
                    found if len(ids) == len(held) else found.take(rows), ids=ids
                )
            )

    return finished


Fetched = Callable[[], GradientRows]
Sources = dict[str, tuple[str, list[int], dict[str, tuple[str, list[int] | None]]]]


def sources_of(file: TensorFile, columns: Sequence[str]) -> tuple[Sources, list[list[int]]]:
    """Per column its form, shape, and where the form's tensors are: (name, None), another column's (name, shape of a row), or, of what is
    projected, (BESIDE, its first and last place in a row). And all such places."""
    heads = json.loads(file.metadata["influence-unit"])
    own: dict[str, dict[str, tuple[str, list[int] | None]]] = {}
    for name in file.entries:
        column, _, part = name.rpartition(":")
        if part != "sqnorms" and not part.endswith(".scale"):
            own.setdefault(column, {})[part] = name, None
    found: Sources = {
        column: (
            heads[column][0],
            heads[column][1],
            own.get(column, {})
            | {part: (name, tail) for part, (name, tail) in heads[column][2].items()},
        )
        for column in columns
    }
    return found, sorted(
        tail for _, _, shared in heads.values() for name, tail in shared.values() if name == BESIDE
    )


def read_ids(path: Path) -> np.ndarray:
    with reading(path) as file:
        return file.read(["ids"])["ids"].numpy()


@contextmanager
def reading(path: Path) -> Iterator[TensorFile]:
    """A unit's file. Raises CacheError where it is damaged."""
    with damaged(path), TensorFile(path) as file:
        yield file


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CacheError(
            f"the cache file {path} is damaged: {type(error).__name__} {error}",
            "delete it; what it held is computed again",
        ) from error
