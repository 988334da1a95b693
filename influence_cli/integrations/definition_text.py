"""Writes the text of a definition.py for a Hugging Face run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence_cli.integrations.column_guess import ColumnChoice
from influence_cli.integrations.run_folder import HuggingFaceFolder

CLASSIFIED = ("sequence-classification", "image-classification")
HEAD = '''"""Describes the training run in this folder to `influence`, in plain functions.

influence runs this file. {summary}
"""

from pathlib import Path

{imports}

HERE = Path(__file__).parent
{setup}

def model():
    """The architecture. influence loads the weights from the checkpoints."""
    return task.model()


def train_data():
    """The examples to rank, in the order of their file."""
    return task.examples({train})


def query_data():
    """The predictions to explain."""
    return task.examples({queries}){query_note}


def example(row):
    """An example of a row (a dict, column to value): for --query, --query-file, --candidates."""
    return task.example(row)


def collate(items):
    """A batch of examples, padded to its longest text."""
    return task.collate(items)


def loss(model, batch):
    """One loss per example, shape (B,): {loss}."""
    return task.loss(model, batch)


def outputs(model, batch):
    """What the loss is computed from: the logits."""
    return task.outputs(model, batch)


def loss_from_outputs(outputs, batch):
    return task.loss_from_outputs(outputs, batch)


def features(model, batch):
    """The last hidden state, shape (B, F): for --method repsim."""
    return task.features(model, batch)


def describe(example):
    """Text for the columns query_text and train_text of the table."""
    return task.describe(example)
'''
LABELLED = '''

def label(example):
    """Text for the columns query_label and train_label; None where the row has no label."""
    return task.label_text(example)
'''
RELABELLED = '''

def relabel(example, label):
    """The example with another label: explains queries that have none."""
    return task.relabel(example, label)
'''
TOKENS = '''

def token(id):
    """The text of a token: for --by token and --method tracin-we."""
    return task.token(id)
'''
MEASURED = '''

def measure_tokens(model, batch):
    """Minus what each token adds to the loss, shape (B, S): for --by query-token."""
    return task.measure_tokens(model, batch)
'''
PICTURED = '''

def image(example):
    """The picture of an example: for the pages of influence report."""
    return task.picture(example)
'''
SAMPLED = '''

def sample(outputs, batch, generator):
    """The batch with labels drawn from the model: for --fisher true."""
    return task.sample(outputs, batch, generator)
'''
DRAWN = ("token-classification", "causal-lm", "masked-lm")  # kinds with Task.sample
IDENTIFIED = '''

def id(example):
    """Your own id of an example: for the columns query_id and train_id."""
    return example["id"]
'''
STAND_IN = """
ROWS = [  # CHANGE: your data, such as table(HERE / "train.csv")
{rows}
]
"""
LOSSES = {
    "token": "the sum over its tokens that have a label",
    "example": "what the model's own .loss is for the example alone",
}


@dataclass(frozen=True)
class DataFiles:
    """The files of --data and --query-data, and what reads them."""

    train: Path
    queries: Path | None
    train_split: str | None = None
    query_split: str | None = None


@dataclass(frozen=True)
class Written:
    """The text of a definition, and what the user must look at."""

    text: str
    notes: tuple[str, ...] = ()  # lines to CHANGE
    choices: tuple[str, ...] = ()  # what was guessed
    lightning_checkpoints: Path | None = None  # a folder of files to convert


def write_hf_definition(
    run: Path,
    folder: HuggingFaceFolder,
    columns: ColumnChoice,
    data: DataFiles | None,
    label_names: Sequence[str] | None,
) -> Written:
    """The definition of a Hugging Face run. `label_names`: where config.json has none."""
    notes: list[str] = []
    lines = [f"    {quoted(folder.kind)},", f"    {here(folder.folder, run)},"]
    lines += [f"    base={here(folder.base, run)},"] if folder.base else []
    lines += list_arguments(folder, columns, label_names, notes)
    setup = "\n".join(["task = huggingface.Task(", *lines, ")"]) + "\n"
    imports = ["from influence_cli import huggingface"]
    train, queries, query_note = "ROWS", "ROWS[:2]", ""
    if data is None:
        setup += STAND_IN.format(rows=stand_in_rows(folder, columns))
        notes.append("ROWS: data of your own")
    else:
        imports.append("from influence_cli.data import table")
        train = table_call(data.train, data.train_split, run)
        queries = train
        if data.queries is not None:
            queries = table_call(data.queries, data.query_split, run)
        if data.queries is None:
            query_note = "  # CHANGE: other examples than those of training"
            notes.append("query_data(): the training data, because --query-data is not given")
    is_language = folder.kind in ("causal-lm", "seq2seq-lm", "masked-lm")
    text = HEAD.format(
        summary=f"Model: {folder.architecture}.",
        imports="\n".join(imports),
        setup=setup,
        train=train,
        queries=queries,
        query_note=query_note,
        loss=LOSSES["token" if is_language else "example"],
    )
    text += LABELLED if folder.kind in (*CLASSIFIED, "seq2seq-lm") else ""
    text += RELABELLED if folder.kind in CLASSIFIED else ""
    text += PICTURED if folder.kind == "image-classification" else TOKENS
    text += MEASURED if folder.kind in ("causal-lm", "seq2seq-lm") else ""
    text += SAMPLED if folder.kind in DRAWN else ""
    text += IDENTIFIED if columns.id else ""
    return Written(text, tuple(notes))


def list_arguments(
    folder: HuggingFaceFolder,
    columns: ColumnChoice,
    label_names: Sequence[str] | None,
    notes: list[str],
) -> list[str]:
    """The lines of the columns and of what no file of the run tells."""
    values: dict[str, Any] = {}  # Any: texts and numbers
    values["text"] = list(columns.text) or None
    values |= {"image": columns.image, "label": columns.label, "id": columns.id}
    lines = [f"    {name}={quoted(value)}," for name, value in values.items() if value is not None]
    if label_names is not None:
        lines.append(f"    label_names={quoted(list(label_names))},  # CHANGE: in training's order")
        notes.append("label_names: config.json does not name the classes; the order is a guess")
    if columns.text and folder.max_length is not None:
        lines.append(
            f"    max_length={folder.max_length},  # tokens; CHANGE if training cut earlier"
        )
    if columns.text and folder.kind == "causal-lm":
        lines.append("    end_of_text=False,  # CHANGE: True if training ended texts with a token")
        notes.append("end_of_text: whether training ended each text with the end token")
    if folder.kind == "masked-lm":
        lines.append("    mask_probability=0.15,  # CHANGE: as in training")
        lines.append("    mask_seed=0,")
        notes.append("mask_probability: training hid random tokens; the definition hides others")
    return lines


def stand_in_rows(folder: HuggingFaceFolder, columns: ColumnChoice) -> str:
    """Rows that run with any tokenizer."""
    texts = ("the first text", "another text", "a third one", "the last text")
    rows = []
    for number, text in enumerate(texts):
        row: dict[str, Any] = dict.fromkeys(columns.text, text)  # Any: texts and numbers
        if columns.label:
            row[columns.label] = (
                number % 2 if folder.kind in CLASSIFIED else [0] * len(text.split())
            )
        if folder.kind == "token-classification":
            row[columns.text[0]] = text.split()
        rows.append(f"    {quoted(row)},")
    return "\n".join(rows)


def table_call(path: Path, split: str | None, run: Path) -> str:
    options = f", split={quoted(split)}" if split is not None else ""
    return f"table({here(path, run)}{options})"


def here(path: Path, run: Path) -> str:
    """A path as an expression, relative to the definition."""
    relative = Path(os.path.relpath(path.resolve(), run.resolve())).as_posix()
    return "HERE" if relative == "." else f"HERE / {quoted(relative)}"


def quoted(value: object) -> str:
    """Python text with double quotes, as formatters write it."""
    if isinstance(value, str):
        text = repr(value)
        plain = text.startswith("'") and '"' not in value and "\\'" not in text
        return f'"{text[1:-1]}"' if plain else text
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(k)}: {quoted(v)}" for k, v in value.items()) + "}"
    return repr(value)
