"""Writes the text of a definition.py for a Lightning run."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from influence_cli.errors import UsageProblem, listed
from influence_cli.integrations.column_guess import IDS, IMAGES, LABELS, first_of
from influence_cli.integrations.definition_text import (
    DataFiles,
    Written,
    here,
    quoted,
    table_call,
)
from influence_cli.integrations.lightning_task import LightningTask, needs_one_by_one
from influence_cli.integrations.tables import Table

PIXELS = 255
ARRAYS = ("x", "image", "images", "data", "inputs", "input", "features")
HEAD = '''"""Describes the training run in this folder to `influence`, in plain functions.

influence runs this file. Model: {model}.
"""

from pathlib import Path

{imports}

HERE = Path(__file__).parent
{setup}

def model():
    """The module. influence loads the weights from the checkpoints."""
    return task.model()


def train_data():
    """The examples to rank."""
    return {train}


def query_data():
    """The predictions to explain."""
    return {queries}


def loss(model, batch):
    """One loss per example, shape (B,): that of training_step() of the example alone."""
    return task.loss(model, batch)


def label(example):
    """Text for the columns query_label and train_label of the table."""
    return task.label_text(example)
'''
ROWS = '''

def example(row):
    """An example of a row (a dict, column to value): for --query, --query-file, --candidates."""
    return task.example(row)
'''


def write_lightning_definition(
    run: Path,
    model: str,
    checkpoints: Sequence[Path],
    data: DataFiles | None,
    rows: Table | None,
    inputs: Sequence[str],
    label: str | None,
    id: str | None,
) -> Written:
    """The definition of a Lightning run. `rows`: those of `data`; without them the module's own
    dataloaders give the examples.

    Raises UsageProblem for columns that the data lacks.
    """
    notes: list[str] = []
    path = find_package(model, run)
    hyperparameters = read_hyperparameters(checkpoints[-1]) if checkpoints else {}
    arguments: dict[str, Any] = {}  # Any: texts and numbers
    if rows is not None:
        arguments = choose_arguments(rows, inputs, label, notes)
    task = LightningTask(model, path, hyperparameters, **arguments)
    dataset = task.dataset("train") if rows is None else task.examples(rows)
    if needs_one_by_one(task, dataset):
        arguments["one_by_one"] = True
    lines = [f"    {quoted(model)},"]
    lines += [f"    path={here(path, run)},"] if path is not None else []
    lines += [f"    hyperparameters={quoted(hyperparameters)},"] if hyperparameters else []
    lines += [f"    {name}={quoted(value)}," for name, value in arguments.items()]
    lines = [mark_scale(line) for line in lines]
    imports = ["from influence_cli import lightning"]
    train, queries = name_datasets(task, run, data)
    if data is not None:
        imports.append("from influence_cli.data import table")
    text = HEAD.format(
        model=model,
        imports="\n".join(imports),
        setup="\n".join(["task = lightning.Task(", *lines, ")"]) + "\n",
        train=train,
        queries=queries,
    )
    text += ROWS if data is not None else ""
    choices = [f"model: {model}"]
    if rows is not None:
        names = ", ".join(arguments["inputs"])
        choices = [f"model: {model}; inputs: {names}; label: {arguments['label']}"]
    return Written(text, tuple(notes), tuple(choices))


def mark_scale(line: str) -> str:
    is_scale = line.strip().startswith("scale=")
    return f"{line}  # CHANGE: as training prepared its pixels" if is_scale else line


def name_datasets(task: LightningTask, run: Path, data: DataFiles | None) -> tuple[str, str]:
    """Expressions for the training examples and the queries."""
    if data is not None:
        train = f"task.examples({table_call(data.train, data.train_split, run)})"
        if data.queries is None:
            return train, "train_data()  # CHANGE: other examples than those of training"
        return train, f"task.examples({table_call(data.queries, data.query_split, run)})"
    model = task.model()
    own = "val" if overrides(model, "val_dataloader") else "train"
    return 'task.dataset("train")', f"task.dataset({quoted(own)})"


def overrides(model: Any, name: str) -> bool:  # Any: a LightningModule
    """Whether the user's class defines this method itself."""
    return any(
        name in vars(kind)
        for kind in type(model).__mro__
        if not kind.__module__.startswith(("lightning.", "pytorch_lightning."))
    )


def find_package(model: str, run: Path) -> Path | None:
    """The folder that holds the package of package.module:Class; None where it is installed."""
    name = model.partition(":")[0].partition(".")[0]
    for place in (Path.cwd(), run, *list(run.resolve().parents)[:3]):
        if (place / f"{name}.py").is_file() or (place / name / "__init__.py").is_file():
            return place
    return None


def read_hyperparameters(checkpoint: Path) -> dict[str, Any]:  # Any: Python literals
    """The arguments of the class that Lightning saved. Raises UsageProblem for values that can't
    be written into a file.
    """
    from influence_cli.integrations.pickled_files import read_pickled

    values = dict(read_pickled(checkpoint).get("hyper_parameters") or {})
    unwritable = [name for name, value in values.items() if not is_literal(value)]
    if unwritable:
        raise UsageProblem(
            f"{checkpoint.name} has hyperparameters that are no plain values: {listed(unwritable)}",
            "expected: numbers, texts, lists and dicts",
            "write definition.py by hand: influence init DIR --template classifier",
        )
    return values


def is_literal(value: object) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False


def choose_arguments(
    rows: Table, inputs: Sequence[str], label: str | None, notes: list[str]
) -> dict[str, Any]:  # Any: texts and numbers
    """The arguments of a task that name columns."""
    known = {name.lower(): name for name in reversed(rows.columns)}
    for name in (*inputs, *([label] if label else [])):
        if name not in rows.columns:
            raise UsageProblem(
                f"the data has no column {name}", f"found: {listed(list(rows.columns))}"
            )
    label = label or first_of(known, LABELS)
    if not inputs:
        single = first_of(known, (*ARRAYS, *IMAGES))
        identity = first_of(known, IDS)
        others = [name for name in rows.columns if name not in (label, identity)]
        inputs = [single] if single else others
    arguments: dict[str, Any] = {"inputs": list(inputs), "label": label}
    sample = rows[0][inputs[0]]
    is_picture = isinstance(sample, bytes | dict) or str(getattr(sample, "dtype", "")) == "uint8"
    is_picture = is_picture or (isinstance(sample, str) and not sample.replace(".", "").isdigit())
    if is_picture:
        arguments["scale"] = PIXELS
        notes.append(
            f"scale: pixels are divided by {PIXELS}; training may have prepared them in another way"
        )
    return arguments
