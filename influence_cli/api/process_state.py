"""Keeps what a definition and a call change in their process inside the call."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from influence_cli.gradients.tf32 import tf32_during
from influence_cli.run.import_scope import ImportScope

# settings of a process that definitions change, and on which their losses may depend
SETTINGS = (
    (os.getcwd, os.chdir),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
)


class ProcessState:
    """The process as one definition wants it: its modules, and the settings that it changed."""

    def __init__(self, definition: Path) -> None:
        self._scope = ImportScope(definition)
        self._values: dict[int, Any] = {}  # position in SETTINGS -> value. Any: of that setting

    @contextmanager
    def entered(self, tf32: bool = False) -> Iterator[None]:
        """A block that runs functions of the definition. After it the process has its own modules,
        import path, settings and random numbers (of torch, on the CPU) again.
        """
        before = read_settings()
        apply_settings(self._values)
        try:
            with self._scope.entered(), torch.random.fork_rng(devices=[]), tf32_during(tf32):
                yield
        finally:
            after = read_settings()
            self._values = {at: value for at, value in after.items() if value != before[at]}
            apply_settings({at: before[at] for at in self._values})


def read_settings() -> dict[int, Any]:  # Any: as above
    return {at: read() for at, (read, _) in enumerate(SETTINGS)}


def apply_settings(values: dict[int, Any]) -> None:  # Any: as above
    for at, value in values.items():
        SETTINGS[at][1](value)
