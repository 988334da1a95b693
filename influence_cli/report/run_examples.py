"""Compares the examples of a page with those of a run, and gets pictures from it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from influence_cli.errors import TableError, UsageProblem, counted, shown
from influence_cli.output.formats import FORMULA_STARTS, encodable
from influence_cli.output.table_record import Record
from influence_cli.progress import Reporter
from influence_cli.report.example_list import QUERY, TRAIN, ExampleKey, ExampleList, ExampleTexts
from influence_cli.report.pictures import encode_picture, require_pillow
from influence_cli.run.datasets import Examples
from influence_cli.run.definition import Definition, load_definition

SPLITS = (TRAIN, QUERY)
REMEDY = "name the run of this table: --run RUN"


@dataclass(frozen=True)
class PictureSource:
    """A run's definition and datasets. `splits`: those whose ids are indices of its datasets."""

    definition: Definition
    examples: Callable[[str], Examples]
    name: str
    splits: tuple[str, ...] = SPLITS

    @property
    def has_pictures(self) -> bool:
        return self.definition.has("image")


def open_source(folder: Path, definition: Path | None, records: Iterable[Record]) -> PictureSource:
    """The run of a folder. Its checkpoints are not read. `records`: of the tables."""
    if not folder.is_dir():
        raise UsageProblem(f"--run {folder}: no such folder", "expected: the folder of a run")
    loaded = load_definition(definition or folder / "definition.py")
    opened: dict[str, Examples] = {}

    def examples(split: str) -> Examples:
        if split not in opened:
            opened[split] = Examples(loaded, split)
        return opened[split]

    given = {key for record in records for key in record.get("request") or {}}
    splits = tuple(split for split in SPLITS if f"rows of {split}" not in given)
    return PictureSource(loaded, examples, folder.resolve().name or str(folder), splits)


def complete_examples(
    examples: ExampleList, source: PictureSource, reporter: Reporter
) -> dict[int, str]:
    """Fill in labels and texts that the tables lack. Returns number of an example -> picture.

    Raises TableError where the run's examples are not those of the tables, DefinitionError for an
    image() that fails.
    """
    if source.has_pictures:
        require_pillow(source.definition.path.name)
    pictures: dict[int, str] = {}
    with reporter.progress("examples", len(examples.texts)) as advance:
        for number, (key, texts) in enumerate(list(examples)):
            advance(1)
            index, table = key.dataset_index, examples.sources[number] or "the table"
            if index is None or key.space not in source.splits:
                continue
            own = source.examples(key.space)
            if index >= len(own):
                raise TableError(
                    f"{table} does not fit the run {source.name}: it names {key.space} {index}",
                    f"{own.source} has {counted(len(own), 'example')}, numbered from 0",
                    REMEDY,
                )
            of_run = read_texts(own, index, source.definition.has("id"))
            problem = f"{table} does not fit the run {source.name}"
            examples.texts[number] = join_run_texts(key, texts, of_run, problem)
            if source.has_pictures:
                image = source.definition.call("image", own.item(index))
                place = f"image() of example {index} of {own.source}"
                if picture := encode_picture(image, place):
                    pictures[number] = picture
    return pictures


def note_missing_pictures(source: PictureSource, reporter: Reporter) -> None:
    """Say of which examples the page has no pictures."""
    if not source.has_pictures:
        reporter.note(f"no pictures: {source.definition.path.name} has no image(example)")
        return
    for split in SPLITS:
        if split not in source.splits:
            reporter.note(
                f"no pictures of rows from the command line, which replaced {split}_data()"
            )


def read_texts(examples: Examples, index: int, has_ids: bool) -> ExampleTexts:
    own_id = examples.own_id(index) if has_ids else None
    return ExampleTexts(examples.label(index), examples.text(index), own_id)


def join_run_texts(
    key: ExampleKey, texts: ExampleTexts, of_run: ExampleTexts, problem: str
) -> ExampleTexts:
    """The texts of the table, else of the run. Raises TableError where they differ."""
    for name, cell, text in zip(ExampleTexts._fields, texts, of_run, strict=True):
        if cell is not None and text is not None and not is_same_text(cell, text):
            raise TableError(
                f"{problem}: the {name.replace('_', ' ')} of {key.space} {key.id} differs",
                f"the table has {shown(cell)}, the run has {shown(text)}",
                f"{REMEDY}; or write the table again",
            )
    pairs = zip(texts, of_run, strict=True)
    return ExampleTexts(*(text if cell is None else cell for cell, text in pairs))


def is_same_text(cell: str, text: str) -> bool:
    """Whether a table's cell shows a text: surrogates are escaped, --safe-cells adds a `'`."""
    shown_text = encodable(text)
    return cell == shown_text or (text.startswith(FORMULA_STARTS) and cell == f"'{shown_text}")
