"""influence convert: checkpoints and optimizer states of other formats as safetensors files."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from influence_cli.cli import command, options
from influence_cli.cli.torch_import import import_torch

From = Annotated[
    Path,
    Argument(
        metavar="FROM",
        help=(
            "File or folder: .pt, .pth, .bin or .ckpt files, torch.distributed.checkpoint folders, "
            "or a Trainer's folder of checkpoint-N."
        ),
    ),
]
To = Annotated[
    Path,
    Argument(
        metavar="TO",
        help="Folder for step-N.safetensors, such as RUN/checkpoints; or one .safetensors file.",
    ),
]
Model = Annotated[
    Path | None,
    Option(
        "--run",
        metavar="RUN",
        help=(
            "Convert the optimizer states in FROM, not the weights. RUN/definition.py builds the "
            "model that gives the parameter names. TO is usually RUN/optimizer."
        ),
    ),
]
Base = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Merge peft adapters into the Hugging Face model in DIR: full checkpoints.",
    ),
]
Placeholders = Annotated[
    bool,
    Option(
        "--placeholders",
        metavar="",
        help="Read unknown classes in pickled files as inert objects; nothing is imported or run.",
    ),
]


@command("convert", example="influence convert lightning_logs/version_0 my_run/checkpoints")
def convert(
    source: From,
    target: To,
    run: Model = None,
    base: Base = None,
    placeholders: Placeholders = False,
    quiet: options.Quiet = False,
) -> None:
    """Write checkpoints of other formats as safetensors files, with step and learning rate.

    stdout lists the files. No code of the files runs. It never changes a file that exists, so the
    same command resumes. With --run, it converts optimizer states.
    """
    import_torch()
    import sys

    from influence_cli.errors import UsageProblem
    from influence_cli.integrations.convert import convert_checkpoints
    from influence_cli.output.stderr_reporter import StderrReporter
    from influence_cli.output.tables import to_stdout
    from influence_cli.output.visible import escape_controls
    from influence_cli.progress import Reporter

    reporter = Reporter() if quiet else StderrReporter()
    if run is not None and base is not None:
        raise UsageProblem(
            "--run converts optimizer states, and --base merges adapters", "give one of them"
        )
    if run is not None:
        from influence_cli.integrations.optimizer_states import convert_optimizer_states

        files = convert_optimizer_states(source, target, run, reporter, placeholders)
    else:
        files = convert_checkpoints(source, target, reporter, placeholders, base)
    with to_stdout(sys.__stdout__ or sys.stderr) as stdout:
        for file in files:
            stdout.write(f"{escape_controls(str(file))}\n")
