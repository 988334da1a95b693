"""Chooses what `influence init` writes for a folder, and reads its data to guess the columns."""

from dataclasses import dataclass, replace
from pathlib import Path

from influence_cli.errors import UsageProblem, listed
from influence_cli.integrations.column_guess import ColumnChoice, choose_columns, is_number
from influence_cli.integrations.definition_text import (
    CLASSIFIED,
    DataFiles,
    Written,
    write_hf_definition,
)
from influence_cli.integrations.image_tables import list_splits
from influence_cli.integrations.run_folder import (
    HuggingFaceFolder,
    find_lightning_checkpoints,
    open_folder,
)
from influence_cli.integrations.tables import Table, table

SAMPLE = 50  # rows that guesses look at
MOST_LABELS = 200_000  # rows whose labels are listed


@dataclass(frozen=True)
class InitFlags:
    """The flags of `influence init` that describe the run, as the user gave them."""

    data: Path | None = None
    query_data: Path | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    id: str | None = None
    base: Path | None = None
    model: str | None = None

    def given(self) -> list[str]:
        values = (self.data, self.query_data, self.text, self.label, self.id, self.base, self.model)
        names = ("--data", "--query-data", "--text", "--label", "--id", "--base", "--model")
        return [name for name, value in zip(names, values, strict=True) if value]


def plan_definition(run: Path, flags: InitFlags) -> Written | None:
    """The definition for what the folder holds; None where it holds no model that this package
    knows and the flags name none.

    Raises UsageProblem for flags that do not fit the folder or the data.
    """
    for flag, path in (("--data", flags.data), ("--query-data", flags.query_data)):
        if path is not None and not path.exists():
            raise UsageProblem(f"{flag} {path}: no such file or folder")
    if flags.query_data is not None and flags.data is None:
        raise UsageProblem("--query-data without --data", "--data FILE names the training data")
    checkpoints = find_lightning_checkpoints(run)
    if flags.model is not None:
        return plan_lightning(run, checkpoints, flags)
    folder = open_folder(run, flags.base)
    if folder is not None:
        return plan_hugging_face(run, folder, flags)
    if checkpoints:
        raise UsageProblem(
            f"{run} holds Lightning checkpoints, which do not name their class",
            f"found: {listed([path.name for path in checkpoints])}",
            "influence init DIR --model package.module:Class names it",
        )
    return None


def plan_lightning(run: Path, checkpoints: list[Path], flags: InitFlags) -> Written:
    """The definition of a Lightning run. Its checkpoints are still to be converted."""
    from influence_cli.integrations.lightning_text import write_lightning_definition

    assert flags.model is not None
    rows = data = None
    if flags.data is not None:
        data = choose_data(flags.data, flags.query_data)
        rows = table(flags.data, data.train_split)
    written = write_lightning_definition(
        run, flags.model, checkpoints, data, rows, flags.text, flags.label, flags.id
    )
    source = checkpoints[0].parent if checkpoints else None
    return replace(written, lightning_checkpoints=source)


def plan_hugging_face(run: Path, folder: HuggingFaceFolder, flags: InitFlags) -> Written:
    if flags.data is None:
        columns = stand_in_columns(folder.kind)
        return write_hf_definition(run, folder, columns, None, None)
    data = choose_data(flags.data, flags.query_data)
    rows = table(flags.data, data.train_split)
    sample = [rows[index] for index in range(min(SAMPLE, len(rows)))]
    names = [str(name) for name in rows.columns]
    columns = choose_columns(folder.kind, names, sample, flags.text, flags.label, flags.id)
    label_names = None
    if folder.kind in CLASSIFIED and columns.label:
        label_names = guess_label_names(folder, rows, columns.label)
    written = write_hf_definition(run, folder, columns, data, label_names)
    adapter = f" with the adapter of {folder.folder.name}" if folder.base else ""
    shown = f"model: {folder.architecture}{adapter}; columns: {columns}"
    return Written(written.text, written.notes, (shown,))


def choose_data(train: Path, queries: Path | None) -> DataFiles:
    """The files, and their splits where an npz file has several."""
    if train.suffix.lower() != ".npz" or not (splits := list_splits(train)):
        return DataFiles(train, queries)
    if queries is not None:
        own = list_splits(queries) if queries.suffix.lower() == ".npz" else []
        return DataFiles(train, queries, splits[0], own[-1] if own else None)
    return DataFiles(train, train if len(splits) > 1 else None, splits[0], splits[-1])


def stand_in_columns(kind: str) -> ColumnChoice:
    if kind == "image-classification":
        return ColumnChoice(label="label", image="image")
    if kind == "token-classification":
        return ColumnChoice(("tokens",), "ner_tags")
    if kind == "seq2seq-lm":
        return ColumnChoice(("source", "target"))
    return ColumnChoice(("text",), "label" if kind in CLASSIFIED else None)


def guess_label_names(folder: HuggingFaceFolder, rows: Table, column: str) -> list[str] | None:
    """The names of the classes in the order of their numbers, where the data has names that
    config.json does not have; None where none are needed.

    Raises UsageProblem for more names than classes.
    """
    values = {rows[index].get(column) for index in range(min(len(rows), MOST_LABELS))}
    names = sorted(value for value in values if isinstance(value, str) and value)
    if not names or set(names) <= set(folder.class_names) or all(map(is_number, names)):
        return None
    count = folder.class_count
    if count is not None and len(names) > count:
        raise UsageProblem(
            f"column {column} has {len(names)} labels, and the model has {count} classes",
            f"labels: {listed(names)}",
            f"classes: {listed(folder.class_names)}" if folder.class_names else "",
            "--label COLUMN names another column",
        )
    return names + [f"class {number}" for number in range(len(names), count or 0)]
