"""influence init: a commented definition.py, for the run that the folder holds."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from influence_cli.cli import command
from influence_cli.cli.options import RUN, option

if TYPE_CHECKING:
    from influence_cli.integrations.definition_plan import InitFlags
    from influence_cli.integrations.definition_text import Written

TEMPLATES = ("classifier", "language-model", "trainer")
DATA = "The data"


@dataclass(frozen=True)
class DataFlags:
    """The flags that describe the run and its data, as the user gave them."""

    data: Annotated[
        Path | None,
        option(
            "--data",
            metavar="FILE",
            panel=DATA,
            help="Training data: csv, tsv, jsonl, Parquet or Arrow, a datasets folder, a folder "
            "CLASS/*.png, or npz.",
        ),
    ] = None
    query_data: Annotated[
        Path | None,
        option(
            "--query-data",
            metavar="FILE",
            panel=DATA,
            help="Data of the predictions to explain. [default: the training data]",
        ),
    ] = None
    text: Annotated[
        list[str] | None,
        option(
            "--text",
            metavar="COL",
            panel=DATA,
            help="Column of the text or picture. Twice for a pair of texts. [default: a guess]",
        ),
    ] = None
    label: Annotated[
        str | None,
        option(
            "--label", metavar="COL", panel=DATA, help="Column of the label. [default: a guess]"
        ),
    ] = None
    id: Annotated[
        str | None,
        option("--id", metavar="COL", panel=DATA, help="Column of your own id. [default: a guess]"),
    ] = None
    base: Annotated[
        Path | None,
        option(
            "--base",
            metavar="DIR",
            panel=RUN,
            help="Base model below an adapter. [default: what adapter_config.json names]",
        ),
    ] = None
    model: Annotated[
        str | None,
        option(
            "--model",
            metavar="PKG:CLASS",
            panel=RUN,
            help="Class of a Lightning model, as package.module:Class.",
        ),
    ] = None


@command("init", example="influence init out --data train.csv --query-data test.jsonl")
def init(
    described: DataFlags,
    directory: Annotated[
        Path,
        Argument(
            metavar="RUN",
            help="Folder of the training run; created if it does not exist.",
            show_default=".",
        ),
    ] = Path("."),
    template: Annotated[
        str | None,
        option(
            "--template",
            metavar="NAME",
            panel=RUN,
            help=f"Text to start from, instead of a look at the folder: {', '.join(TEMPLATES)}.",
        ),
    ] = None,
) -> None:
    """Write a commented definition.py: model, data and loss, in plain functions.

    init looks at the folder first. For a Hugging Face, adapter or Lightning run the definition
    runs unedited. init marks what it can't know with CHANGE. It never overwrites a file.
    """
    from influence_cli.errors import UsageProblem
    from influence_cli.integrations.definition_plan import InitFlags
    from influence_cli.output.visible import write_message

    flags = InitFlags(**vars(described) | {"text": tuple(described.text or ())})
    path = directory / "definition.py"
    if path.exists():
        raise UsageProblem(f"{path} is there already", "name another folder, or delete it first")
    written = describe_run(directory, flags, template)
    lines = [f"wrote {path}", *(f"  {choice}" for choice in written.choices)]
    lines += convert_checkpoints(directory, written)
    write_definition(directory, path, written.text)
    lines += [f"  CHANGE {note}" for note in written.notes]
    write_message("\n".join([*lines, f"next: influence inspect {directory}"]))


def convert_checkpoints(directory: Path, written: "Written") -> list[str]:
    """Write the safetensors files of a Lightning run. Returns lines that say so."""
    if written.lightning_checkpoints is None:
        return []
    from influence_cli.integrations.convert import convert_lightning
    from influence_cli.output.stderr_reporter import StderrReporter

    place = directory / "checkpoints"
    saved = convert_lightning(written.lightning_checkpoints, place, StderrReporter())
    return [f"  wrote into {place}: {', '.join(path.name for path in saved)}"]


def describe_run(directory: Path, flags: "InitFlags", template: str | None) -> "Written":
    """The text to write. Raises UsageProblem for flags that do not fit the folder."""
    from influence_cli.api.specs import one_of
    from influence_cli.errors import UsageProblem
    from influence_cli.integrations.definition_plan import plan_definition
    from influence_cli.integrations.definition_text import Written

    if template is not None and flags.given():
        raise UsageProblem(
            f"--template and {flags.given()[0]}", "a template describes no run of yours; give one"
        )
    planned = None if template is not None else plan_definition(directory, flags)
    if planned is not None:
        return planned
    if flags.given():
        raise UsageProblem(
            f"{directory} holds no model that init knows",
            "expected: config.json or adapter_config.json in it or in checkpoint-N/, "
            f"or --model PKG:CLASS; {flags.given()[0]} describes the data of a model",
            "influence init DIR writes a definition with random data to start from",
        )
    name = one_of("--template", template or TEMPLATES[0], TEMPLATES)
    text = (Path(__file__).parent / "templates" / f"{name}.py").read_text(encoding="utf-8")
    place = directory / "checkpoints"
    return Written(text, choices=(f"edit its lines with CHANGE, and put checkpoints into {place}",))


def write_definition(directory: Path, path: Path, text: str) -> None:
    """Write the file and its folder, or neither."""
    from influence_cli.errors import InfluenceError, UsageProblem
    from influence_cli.storage.atomic import describe_disk_error, remove_stale_siblings, write_text

    new = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_stale_siblings(path)
        write_text(path, text)
    except OSError as error:
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        wrong_name = isinstance(error, FileExistsError | NotADirectoryError)
        problem = UsageProblem if wrong_name else InfluenceError  # exit 2: RUN; 1: the disk
        raise problem(
            describe_disk_error(path, error),
            f"expected: {directory} is a folder, or can be made",
        ) from error
