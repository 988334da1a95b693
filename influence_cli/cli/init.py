"""influence init: a commented definition.py to start from."""

import contextlib
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from influence_cli.cli import command

TEMPLATES = ("classifier", "language-model", "trainer")


@command("init", example="influence init my_run --template language-model")
def init(
    directory: Annotated[
        Path,
        Argument(
            metavar="DIR", help="Where to write it; created if it does not exist.", show_default="."
        ),
    ] = Path("."),
    template: Annotated[
        str, Option(metavar="NAME", help=f"What to start from: {', '.join(TEMPLATES)}.")
    ] = "classifier",
) -> None:
    """Write a commented definition.py: model, data and loss, in plain functions. Never overwrites
    one.
    """
    from influence_cli.cli.specs import one_of
    from influence_cli.cli.streams import write_message
    from influence_cli.errors import InfluenceError, UsageProblem
    from influence_cli.storage.atomic import describe_disk_error, remove_stale_siblings, write_text

    one_of("--template", template, TEMPLATES)
    text = (Path(__file__).parent / "templates" / f"{template}.py").read_text(encoding="utf-8")
    path = directory / "definition.py"
    if path.exists():
        raise UsageProblem(f"{path} is there already", "name another folder, or delete it first")
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
        problem = UsageProblem if wrong_name else InfluenceError  # exit 2: DIR; 1: the disk
        raise problem(
            describe_disk_error(path, error),
            f"expected: {directory} is a folder, or can be made",
        ) from error
    write_message(
        f"wrote {path}\n"
        f"next: edit it, put checkpoints into {directory / 'checkpoints'}, then: influence inspect "
        f"{directory}"
    )
