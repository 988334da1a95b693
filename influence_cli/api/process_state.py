"""Keeps what a call changes in its process inside the call."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from influence_cli.gradients.tf32 import tf32_during
from influence_cli.run.import_scope import ImportScope


@contextmanager
def undisturbed_process(scope: ImportScope, tf32: bool = False) -> Iterator[None]:
    """Inside, Python knows the own modules of the definition. Afterwards its modules, its import
    path, torch's TF32 settings and torch's random numbers on the CPU are as before.
    """
    with scope.entered(), torch.random.fork_rng(devices=[]), tf32_during(tf32):
        yield
