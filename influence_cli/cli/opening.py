"""From the flags that every command shares to an opened run."""

import dataclasses
import os
from pathlib import Path

from influence_cli.api.given_rows import Given
from influence_cli.api.opening import Opened, RunArguments, open_folder
from influence_cli.cli.options import Shared
from influence_cli.extraction.machine import keep_freed_memory
from influence_cli.gradients.tf32 import allow_tf32
from influence_cli.output.stderr_reporter import StderrReporter
from influence_cli.parallel.ranks import place_of
from influence_cli.progress import Reporter


def open_shared(
    flags: Shared,
    trajectory: Path | None = None,
    create: bool = True,
    searched: bool = False,
    verify: bool = False,
    given: Given | None = None,
    connected: bool = True,
) -> Opened:
    """Open the run and its cache (not `create`: only if it is there). `given`: rows from the
    command line. Not `connected`: ranks share only what the cache stores.

    Raises UsageProblem for flags that contradict each other or the machine.
    """
    place = place_of(os.environ)
    names = {field.name for field in dataclasses.fields(RunArguments)} & vars(flags).keys()
    values = {name: getattr(flags, name) for name in names}
    arguments = RunArguments(**values, trajectory=trajectory, verify=verify)
    keep_freed_memory()
    folder = open_folder(arguments, place, create, searched)
    allow_tf32(folder.settings.tf32)  # after definition.py, which may allow it for training
    reporter = Reporter() if flags.quiet or place.rank else StderrReporter()
    if not connected:
        folder = dataclasses.replace(folder, place=None)
    return folder.select(reporter, flags.steps, flags.layers, given)
