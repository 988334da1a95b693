"""Imports torch at the lowest cost."""

import gc
import sys


def import_torch() -> None:
    """Import torch without garbage collection.

    What an import makes stays until the process ends. Python would look through it for garbage
    again and again, now and later. gc.freeze() ends that. Does nothing in a process that has torch
    already, or that collects no garbage.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
